"""Verl workers give what one process gives: every verb, every record, any number of workers, across checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dare.algorithms.base import Algorithm
from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.core.types import Samples, TraceBatch
from dare.executors.local import LocalEngine
from dare.families.tokenizer import char_tokenizer
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints
from dare.training.run import train
from dare.training.update import plan_iterations, update
from tests.conftest import ALPHABET, save_checkpoint

PROMPTS = [[1, 2, 3]] * 4 + [[4, 5]] * 4 + [[6]] * 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scale")
    return {name: save_checkpoint(root / name, name, char_tokenizer(ALPHABET)) for name in ("llada", "sdar_moe")}


def recipe_of(checkpoint: Path, algorithm: Any, executor: Any = "local", lora: Any = None, **train: Any) -> Recipe:
    is_online = algorithm not in ("sft", "dpo", "vrpo")
    data = {
        "name": "scale",
        "seed": 5,
        "executor": executor,
        "model": {"path": str(checkpoint)},
        "lora": lora,
        "algorithm": algorithm,
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 40, "eval_size": 8},
        "decode": {"gen_length": 8, "block_length": 4, "temperature": 1.0 if is_online else 0.0, "unmask": "max_prob"},
        "train": {
            "steps": 6,
            "batch_size": 6,
            "prompts_per_step": 3,
            "completions_per_prompt": 4,
            "updates_per_rollout": 2 if is_online else 1,
            "micro_batch_views": 5,
            **train,
        },
        # With a small eps Adam divides gradients that are all rounding by themselves.
        "optimizer": {"lr": 1e-2, "eps": 1e-3},
        "evaluation": {"every": 2, "num": 8},
        "checkpoint": {"every": 2, "keep_last": 4},
    }
    return parse_recipe(data, where="test")


@pytest.fixture(scope="module", params=["llada", "sdar_moe"])
def pair(
    request: pytest.FixtureRequest, cluster: None, checkpoints: dict[str, Path]
) -> Iterator[tuple[Engine, Engine]]:
    """One process and two workers, both with a reference and a critic."""
    recipe = recipe_of(checkpoints[request.param], "espo", {"name": "verl", "num_workers": 2})
    tokenizer = char_tokenizer(ALPHABET)
    local = LocalEngine.create(recipe, tokenizer, needs_reference=True, critic_lr=1e-2)
    workers: Engine = recipe.executor.build().create(recipe, tokenizer, needs_reference=True, critic_lr=1e-2)
    yield local, workers
    workers.close()


def rollout(engine: Engine, **options: Any) -> TraceBatch:
    recipe = recipe_of(Path("unused"), "espo")
    return engine.generate(PROMPTS, recipe.decode, Key(7), [100 + row for row in range(len(PROMPTS))], **options)


def equal(one: Any, other: Any) -> None:
    """Dataclasses of tensors, equal to the bit except for floats, which differ by rounding."""
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 if left.is_floating_point() else 0)
        elif hasattr(left, "__dataclass_fields__"):
            equal(left, right)
        elif field.name != "weights_version":
            assert left == right


def by_sample(trace: TraceBatch) -> TraceBatch:
    """Nodes of a tree in the order of their rows: how parts were put together shows in nothing else."""
    tree = trace.tree
    assert tree is not None
    depth_N = torch.zeros_like(tree.parent_N)
    for node, parent in enumerate(tree.parent_N.tolist()):
        depth_N[node] = 0 if parent < 0 else depth_N[parent] + 1
    order_N = (depth_N * 1000 + tree.sample_N).argsort(stable=True)
    place_N = order_N.argsort()
    parent_N = torch.where(tree.parent_N < 0, -1, place_N[tree.parent_N])[order_N]
    tree.parent_N = parent_N
    for name in ("state_NS", "sample_N", "is_leaf_N"):
        setattr(tree, name, getattr(tree, name)[order_N])
    return trace


def test_rollouts_and_all_that_they_record(pair: tuple[Engine, Engine]) -> None:
    local, workers = pair
    equal(rollout(local), rollout(workers))
    drafted = [rollout(engine, has_drafts=True) for engine in pair]
    for trace in drafted:
        assert trace.drafts is not None
        trace.drafts.seen_DS[~trace.canvas.is_real_BS[trace.drafts.sample_D]] = 0  # means nothing beyond a row's end
        trace.drafts.draft_DS[~trace.canvas.is_real_BS[trace.drafts.sample_D]] = 0
    equal(*drafted)
    equal(by_sample(rollout(local, branching=(2, 2))), by_sample(rollout(workers, branching=(2, 2))))


def samples_of(engine: Engine, algorithm: Algorithm[Any]) -> Samples:
    trace = rollout(engine, has_drafts="drafts" in algorithm.needs, branching=algorithm.branching(4))
    advantage_B = torch.tensor([1.0, -0.5, 0.25, -0.75] * 3)
    is_pairs = algorithm.row_kind == "pairs"
    if trace.drafts is not None:
        trace.drafts.reward_D = (trace.drafts.draft_DS.sum(-1) % 5).float()
    return Samples(
        canvas=trace.canvas,
        is_scored_BS=trace.canvas.is_completion_BS.clone(),
        sample_id_B=trace.sample_id_B,
        advantage_B=advantage_B,
        group_B=torch.arange(12) // (2 if is_pairs else 4),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
        eos_ids=trace.eos_ids,
        reward_B=torch.tensor([1.0, 0.0] * 6) if is_pairs else advantage_B,
        drafts=trace.drafts,
        tree=trace.tree,
        progress=0.5,
    )


def trained(engine: Engine, algorithm: Algorithm[Any], folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Metrics of two updates from the checkpoint's weights, and all that a checkpoint afterwards holds."""
    samples = samples_of(engine, algorithm)
    iterations = plan_iterations(engine, algorithm, samples, Key(1), 2)
    metrics = [update(engine, algorithm, samples, iteration) for iteration in iterations]
    (folder / "trainer").mkdir(parents=True)
    engine.save(folder)
    return metrics, {path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("algorithm", ["sft", "vrpo", "d1", "tracerl_value", "mdpo", "dtreerpo"])
def test_updates_and_checkpoints(pair: tuple[Engine, Engine], algorithm: str, tmp_path: Path) -> None:
    """Starting from one checkpoint, which both engines load again before each algorithm."""
    check_updates(pair, algorithm, tmp_path, num_files=4)


def check_updates(pair: tuple[Engine, Engine], algorithm: Any, tmp_path: Path, num_files: int) -> None:
    """Two updates of both engines from the same weights give the same metrics and the same checkpoints."""
    start = tmp_path / "start"
    (start / "trainer").mkdir(parents=True)
    pair[0].save(start)
    built = recipe_of(Path("unused"), algorithm).algorithm.build()
    results = []
    for index, engine in enumerate(pair):
        engine.load(start)
        engine.publish()
        results.append(trained(engine, built, tmp_path / str(index)))
    (local_metrics, local_files), (metrics, files) = results
    for expected, found in zip(local_metrics, metrics, strict=True):
        assert found.pop("replay_gap") < 2e-5
        assert expected.pop("replay_gap") < 2e-5
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
        assert expected["grad_norm"] > 0
    assert files.keys() == local_files.keys()
    assert len(files) == num_files
    for name, tensors in local_files.items():
        assert files[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(files[name][key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    for engine in pair:
        engine.load(start)


def logs(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_moves_between_world_sizes(cluster: None, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Two steps in one process, two on two workers with packed views, two on four that hold two copies of the weights:
    the metrics of a run that stayed."""
    train(recipe_of(checkpoints["llada"], "espo"), tmp_path / "stayed", NullReporter())
    places: list[tuple[Any, int | None]] = [
        ("local", None),
        ({"name": "verl", "num_workers": 2}, 40),
        ({"name": "verl", "num_workers": 4, "fsdp_size": 2}, None),
    ]
    for index, (executor, pack_length) in enumerate(places):
        options = {"steps": 2 * (index + 1), "pack_length": pack_length}
        recipe = recipe_of(checkpoints["llada"], "espo", executor, **options)
        train(recipe, tmp_path / "moved", NullReporter(), is_resumed=index > 0)
    for expected, found in zip(logs(tmp_path / "stayed"), logs(tmp_path / "moved"), strict=True):
        expected.pop("replay_gap", None)
        found.pop("replay_gap", None)
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    ends = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("stayed", "moved")]
    for expected_path, found_path in zip(*(sorted(end.rglob("*.safetensors")) for end in ends), strict=True):
        expected_tensors, found_tensors = load_file(expected_path), load_file(found_path)
        assert expected_tensors.keys() == found_tensors.keys()
        for key, tensor in expected_tensors.items():
            torch.testing.assert_close(found_tensors[key], tensor, rtol=1e-3, atol=2e-5)


def test_a_dead_worker_ends_the_run_with_one_error(cluster: None, checkpoints: dict[str, Path]) -> None:
    import ray

    recipe = recipe_of(checkpoints["llada"], "espo", {"name": "verl", "num_workers": 2, "timeout_s": 60})
    engine: Any = recipe.executor.build().create(
        recipe, char_tokenizer(ALPHABET), needs_reference=False, critic_lr=None
    )
    try:
        with pytest.raises(DareError, match="must be whole blocks"):
            engine.generate(PROMPTS, recipe.decode.model_copy(update={"gen_length": 7}), Key(0), list(range(12)))
        ray.kill(engine.workers.group.workers[1])
        with pytest.raises(DareError, match="a worker died during 'generate'"):
            rollout(engine)
    finally:
        engine.close()


def test_mistakes_have_one_message(checkpoints: dict[str, Path], cluster: None) -> None:
    for executor, message in (
        ({"name": "verl", "num_workers": 2, "in_process": True}, "one process can hold one worker"),
        ({"name": "verl", "num_workers": 64}, "too few free CPUs"),
    ):
        recipe = recipe_of(checkpoints["llada"], "espo", executor)
        with pytest.raises(DareError, match=message):
            recipe.executor.build().create(recipe, char_tokenizer(ALPHABET), needs_reference=False, critic_lr=None)
