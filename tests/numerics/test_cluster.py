"""Plans for many GPUs: sizes are those of the tensors, counts those of an update, the rest is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dare.cli import app
from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.diffusion import corrupt
from dare.families.flops import training_flops
from dare.families.weights import create_family
from dare.terminal.cluster import Planned, plan_nodes
from dare.training.calibrate import calibrate
from dare.training.cluster import Hardware, Sharding, plan_cluster
from dare.training.workload import model_sizes, workload
from tests.numerics.test_recompute import recipe as tiny_recipe
from tests.numerics.test_recompute import samples_of

MODELS = Path(__file__).parents[2] / "recipes" / "cluster" / "models"


def recipe_of(model: str, algorithm: Any = "espo", **changes: Any) -> Recipe:
    data = {
        "name": "large",
        "model": {"path": str(MODELS / model), "dtype": "bfloat16"},
        "algorithm": algorithm,
        "task": "chain_sum",
        "decode": {"gen_length": 64, "temperature": 1.0},
        "train": {"prompts_per_step": 8, "completions_per_prompt": 8, "micro_batch_views": 4, "recompute": "full"},
    }
    return parse_recipe({**data, **changes}, where="test")


def planned(model: str, nodes: int, gpus: int = 8, algorithm: Any = "espo", **changes: Any) -> Planned:
    return plan_nodes(recipe_of(model, algorithm, **changes), nodes, gpus)


@pytest.mark.parametrize("name", ["llada", "sdar", "sdar_moe", "llada2"])
def test_kept_activations_are_about_what_a_layer_keeps(name: str) -> None:
    family = create_family(
        name,
        vocab_size=64,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        mlp_size=128,
        max_length=128,
        block_length=4,
        mask_id=63,
        eos_id=62,
        pad_id=61,
        seed=0,
    )
    samples = samples_of(family, [(16, 48)] * 2)
    views = corrupt.bernoulli(samples, Key(0), num_views=1)
    num_tokens = 2 * 64 * (2 if samples.canvas.is_blockwise else 1)
    sizes = model_sizes(family)
    family.to(device=torch.device("meta"))
    canvas = samples.canvas.rows(views.sample_R)
    measured = calibrate(family, torch.device("cpu"), tiny_recipe(), views, canvas, 2 * 64)
    assert sizes.kept_per_token * num_tokens * 4 * 4 == pytest.approx(measured.activations, rel=0.25)


def test_the_work_of_a_step_is_that_of_its_rows() -> None:
    found = planned("sdar-30b-a3b", 1, algorithm="tracerl").work
    assert found.num_rows == 64
    assert found.num_scored == 64 * 64
    assert found.num_views == 64 * 4  # blocks of four positions, one token a step
    assert found.num_forwards == 64
    assert found.rollout_positions == 4
    tiny = create_family(
        "llada",
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        mlp_size=48,
        max_length=96,
        mask_id=63,
        eos_id=62,
        pad_id=61,
        seed=0,
    )
    recipe = recipe_of("llada-8b", "sft", decode={"gen_length": 16}, train={"batch_size": 8})
    algorithm = recipe.algorithm.build()
    work = workload(recipe, tiny, algorithm, 24, 1.0)
    samples = samples_of(tiny, [(8, 16)] * 8)
    views = algorithm.corrupt(samples, Key(0))
    targets = 2.0 * tiny.network.head_weight.numel()
    rest = training_flops(tiny, views, samples.canvas.rows(views.sample_R)) - 3 * targets * int(
        views.is_target_RS.sum()
    )
    assert 3 * work.forward_flops == pytest.approx(rest, rel=0.2)  # masks are random, the layers are not
    assert work.num_scorings == work.num_forwards == 0


@pytest.mark.parametrize(("nodes", "size"), [(1, None), (2, None), (2, 8), (4, 8)])
def test_sizes_add_up_to_those_of_the_whole(nodes: int, size: int | None) -> None:
    executor = {"name": "verl", "fsdp_size": size}
    found = planned("llada-8b", nodes, algorithm={"name": "d1", "beta": 0.04}, executor=executor)
    num = found.work.model.num_parameters
    shared = size or nodes * 8
    assert num == 8_015_581_184
    for part, per_number in (("weights", 4), ("gradients", 4), ("optimizer", 8), ("reference policy", 2)):
        assert found.plan.memory[part] * shared == pytest.approx(per_number * num)
    assert found.plan.memory["rollout: whole weights"] == 2 * num
    assert ("update: gradients of copies" in found.plan.volume) == (nodes * 8 > shared)
    assert found.plan.volume["rollout: weights gathered"] == pytest.approx(2 * num * (shared - 1) / shared)
    assert found.plan.peak < sum(found.plan.memory.values())


def test_one_gpu_sends_nothing_and_more_gpus_take_less_time() -> None:
    assert planned("llada-8b", 1, 1).plan.volume == {}
    seconds = [
        planned("llada-8b", nodes, executor={"name": "verl", "fsdp_size": 8}).plan.seconds for nodes in (1, 2, 4)
    ]
    for part in ("update", "score"):
        assert seconds[0][part] == pytest.approx(2 * seconds[1][part])
        assert seconds[1][part] == pytest.approx(2 * seconds[2][part])


def test_adapters_offload_and_critics() -> None:
    whole, adapted = planned("llada-8b", 1), planned("llada-8b", 1, lora={"rank": 16, "target_modules": ["q_proj"]})
    assert adapted.work.model.num_trained < 0.01 * whole.work.model.num_trained
    assert adapted.plan.memory["optimizer"] < 0.01 * whole.plan.memory["optimizer"]
    assert adapted.plan.seconds["update"] < whole.plan.seconds["update"]
    offloaded = planned("llada-8b", 1, executor={"name": "verl", "cpu_offload": True})
    assert "optimizer" not in offloaded.plan.memory
    assert offloaded.plan.host_memory["offloaded shards"] == pytest.approx(16 * 8_015_581_184)
    critic = planned("sdar-30b-a3b", 4, algorithm="tracerl_value")
    assert critic.plan.memory["critic"] == pytest.approx(16 * 30_532_122_624 / 32)
    assert planned("sdar-30b-a3b", 1, algorithm="mdpo").work.num_views == 64 * 4


def test_where_it_breaks_is_said() -> None:
    flash = planned("llada2-flash-100b", 16)
    assert any("does not fit: the rollout" in note for note in flash.plan.notes)
    few = plan_cluster(planned("llada-8b", 1).work, Sharding(64, 8), Hardware())
    assert any("some wait" in note for note in few.notes)
    with pytest.raises(DareError, match="copies of the weights are of equal size"):
        planned("llada-8b", 1, executor={"name": "verl", "fsdp_size": 3})
    new = parse_recipe({**recipe_of("llada-8b").model_dump(), "model": {"create": {"family": "llada"}}}, where="test")
    with pytest.raises(DareError, match="no sizes to plan with"):
        plan_nodes(new, 1, 8)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of("llada-8b").dump_yaml())
    arguments = ["plan", str(path), "--nodes", "2", "--gpus-per-node", "4", "--row-length", "128"]
    text = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    for word in ("memory of a GPU", "rollout", "communication", "sent by a GPU", "assumed: peak_tflops 989"):
        assert word in text
    faster = CliRunner().invoke(app, [*arguments, "--assume", "mfu=0.8", "--json"], catch_exceptions=False).stdout
    slower = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    assert json.loads(slower)["seconds"]["update"] == pytest.approx(2 * json.loads(faster)["seconds"]["update"])
    for wrong, message in (("mfu", "cannot read"), ("mfuu=0.5", "mfu")):
        result = CliRunner().invoke(app, [*arguments, "--assume", wrong])
        assert message in str(result.exception) or message in result.output
