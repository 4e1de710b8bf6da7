"""The plan of a run: its parts are sizes of real tensors, and a network of any depth costs what its layers cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dare.cli import app
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.diffusion import corrupt
from dare.families.base import Family
from dare.families.layers.attention import KVCache
from dare.families.lora import add_adapter, outline_adapter
from dare.families.tokenizer import char_tokenizer
from dare.families.weights import create_family, load_family, outline_family, save_family
from dare.rollout.engine import denoise
from dare.rollout.meter import Meter
from dare.rollout.plan import make_plan
from dare.training import plan
from dare.training.calibrate import calibrate
from dare.training.live_bytes import LiveBytes
from dare.training.optim import Optimizer
from dare.training.planning import plan_run
from dare.training.rollout_cost import rollout_tokens
from tests.conftest import save_checkpoint, tiny_family
from tests.numerics.test_recompute import recipe, samples_of

LENGTHS = [(6, 26)] * 6
FAMILIES = ("llada", "dream", "sdar", "llada2")


def deep_family(name: str, num_layers: int) -> Family:
    return create_family(
        name,
        vocab_size=64,
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        mlp_size=48,
        max_length=96,
        block_length=4,
        mask_id=63,
        eos_id=62,
        pad_id=61,
        seed=0,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_those_of_the_tensors(name: str) -> None:
    family = deep_family(name, 2)
    with LiveBytes() as count:
        optimizer = Optimizer(family.network.named_parameters(), recipe().optimizer, 1)
        for master in optimizer.masters.values():
            master.grad = torch.ones_like(master)
        gradients = count.live
        optimizer.adam.step()
        moments = count.live - gradients
    assert plan.gradient_bytes(family) == gradients
    assert plan.optimizer_bytes(family) == moments
    assert plan.weight_bytes(family) == sum(t.nbytes for t in [*family.network.parameters(), *family.network.buffers()])
    cache = family.cache(3, 20)
    assert plan.cache_bytes(family, 3, 20) == _bytes(cache)


def _bytes(cache: KVCache) -> int:
    return sum(tensor.nbytes for tensor in [*cache.keys, *cache.values])


def test_low_precision_weights_have_masters() -> None:
    family = deep_family("llada", 2)
    full = plan.optimizer_bytes(family)
    assert plan.optimizer_bytes(family.to(dtype=torch.bfloat16)) == full * 3 // 2
    assert plan.gradient_bytes(family) == family.num_parameters * 4


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_deep_network_costs_what_is_predicted_from_a_shallow_one(name: str, recompute: str, tmp_path: Path) -> None:
    """Every tensor of one forward and backward of seven layers, counted, against the calibration on three and four."""
    family = deep_family(name, 7)
    save_family(family, tmp_path)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(2), num_views=1)
    canvas = samples.canvas.rows(views.sample_R)
    options = recipe(recompute=recompute)
    cost = calibrate(outline_family(tmp_path), torch.device("cpu"), options, views, canvas, 100)
    family.network.recompute = options.train.recompute
    for parameter in family.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as count:
        hidden_RTD = family.view_hidden(views, canvas, is_read_RS=views.is_target_RS)
        total, _ = family.target_total(hidden_RTD, views, torch.where(views.is_target_RS, -1e-3, 0.0))
        total.backward()
    # A mixture's activations follow the routing, which differs from layer to layer.
    assert cost.activations + cost.workspace == pytest.approx(count.peak, rel=0.05 if name == "llada2" else 0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_costs_what_is_predicted_and_needs_no_reference(name: str, tmp_path: Path) -> None:
    """Frozen weights keep no input for their gradient; every tensor of six layers counted, as above."""
    options = LoraRecipe(rank=3)
    family = deep_family(name, 6)
    save_family(family, tmp_path)
    planned = outline_family(tmp_path).to(device=torch.device("meta"))
    outline_adapter(planned, options)
    add_adapter(family, options, Key(0))
    assert plan.gradient_bytes(planned) == plan.gradient_bytes(family) < plan.weight_bytes(planned) / 2
    assert plan.weight_bytes(planned) == plan.weight_bytes(family)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(2), num_views=1)
    canvas = samples.canvas.rows(views.sample_R)
    cost = calibrate(planned, torch.device("cpu"), recipe(), views, canvas, 100)
    for parameter in family.network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as count:
        hidden_RTD = family.view_hidden(views, canvas, is_read_RS=views.is_target_RS)
        total, _ = family.target_total(hidden_RTD, views, torch.where(views.is_target_RS, -1e-3, 0.0))
        total.backward()
    assert cost.activations + cost.workspace == pytest.approx(count.peak, rel=0.05 if name == "llada2" else 0.01)


def test_the_peak_is_the_largest_of_what_exists_together() -> None:
    parts: dict[str, Any] = {
        "weights": 100,
        "optimizer": 200,
        "gradients": 50,
        "activations": 30,
        "workspace": 10,
        "step": 5,
        "reference": 7,
        "critic": 0,
        "rollout": 0,
        "process": 1000,
    }
    assert plan.MemoryPlan(**parts, has_many_micro_batches=True).peak == 1307 + 50 + 40
    assert plan.MemoryPlan(**parts, has_many_micro_batches=False).peak == 1307 + 50 + 5
    parts["rollout"] = 500
    assert plan.MemoryPlan(**parts, has_many_micro_batches=True).peak == 1307 + 500


def tiny_recipe(algorithm: str, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "planned",
        "model": {"create": {"family": "sdar", "hidden_size": 16, "num_layers": 5, "num_heads": 2, "mlp_size": 24}},
        "algorithm": {"name": algorithm},
        "task": {"name": "chain_sum"},
        "decode": {"gen_length": 8, "temperature": 1.0},
        "train": {"steps": 3, "batch_size": 4, "prompts_per_step": 2, "completions_per_prompt": 2},
    }
    return parse_recipe({**data, **changes}, where="test")


def test_a_run_is_planned_from_its_own_rows() -> None:
    found = plan_run(tiny_recipe("sft"))
    assert found.memory.rollout == found.memory.reference == 0
    assert found.memory.gradients == found.num_parameters * 4
    assert found.memory.optimizer == found.num_parameters * 8
    assert found.num_micro_batches == 1
    assert found.tokens_per_second > 0
    several = plan_run(tiny_recipe("sft", train={"steps": 3, "batch_size": 4, "micro_batch_views": 1}))
    assert several.num_micro_batches == 4
    assert several.memory.activations < found.memory.activations


def test_a_rollout_has_a_cache_and_a_reference_policy_weights() -> None:
    found = plan_run(tiny_recipe("espo"))
    assert found.memory.rollout > 0
    assert found.memory.reference == found.memory.weights


def test_an_adapter_alone_is_trained_and_its_base_the_reference(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "sdar", char_tokenizer("0123456789+-="))
    changes = {"model": {"path": str(tmp_path / "base")}, "lora": {"rank": 2, "target_modules": ["q_proj"]}}
    found = plan_run(tiny_recipe("espo", **changes))
    assert found.num_trained == 2 * 2 * (32 + 32)  # two layers
    assert found.memory.gradients == found.num_trained * 4
    assert found.memory.reference == 0


@pytest.mark.parametrize(("name", "cache"), [("llada", c) for c in ("none", "prefix", "dual")] + [("sdar", "auto")])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_tokens_of_a_rollout_are_those_that_it_runs(name: str, cache: str, steps: int) -> None:
    """Prompts of whole blocks in groups, against the counter of a real rollout."""
    family = tiny_family(name)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8]] * 3 + [[8, 7, 6, 5, 4, 3, 2, 1]] * 3
    decode = Decode(gen_length=12, block_length=4, steps_per_block=steps, cache=cache, eos_stop=False, temperature=1.0)
    meter = Meter()
    denoise(family, prompts, decode, Key(0), list(range(6)), meter=meter)
    canvas = family.empty_canvas(prompts, 12, 4)
    assert rollout_tokens(make_plan(family, decode), canvas, 3) == meter.num_tokens


def test_an_online_plan_says_how_long_a_rollout_takes() -> None:
    assert plan_run(tiny_recipe("sft")).rollout_seconds is None
    found = plan_run(tiny_recipe("espo")).rollout_seconds
    assert found is not None
    assert found > 0


def test_the_command_prints_parts_or_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe("sft").dump_yaml())
    text = CliRunner().invoke(app, ["plan", str(path)], catch_exceptions=False).stdout
    for word in ("weights", "optimizer", "activations", "peak, at one time", "tokens/s"):
        assert word in text
    found = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"], catch_exceptions=False).stdout)
    assert found["peak_bytes"] > sum(found["bytes"][name] for name in ("weights", "optimizer"))


def test_what_cannot_run_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="no checkpoint at"):
        plan_run(tiny_recipe("sft", model={"path": str(tmp_path / "absent")}))
    with pytest.raises(DareError, match="trains on rewards"):
        plan_run(tiny_recipe("espo", task=None))


def test_an_outline_has_no_weights(tmp_path: Path) -> None:
    save_family(deep_family("sdar", 2), tmp_path)
    found = outline_family(tmp_path)
    assert {parameter.device.type for parameter in found.network.parameters()} == {"meta"}
    assert found.num_parameters == load_family(tmp_path).num_parameters
