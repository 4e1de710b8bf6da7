"""Every row of the families table is trained by the same code, and mixtures report how their experts are used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dare.algorithms.base import Algorithm
from dare.core.recipe import parse_recipe
from dare.core.registry import ALGORITHMS, FAMILIES, resolve
from dare.core.rng import Key
from dare.core.types import Samples
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.training.update import plan_iterations, update
from tests.conftest import tiny_family
from tests.numerics.records import with_records

MIXTURES = {"llada_moe", "sdar_moe", "llada2"}


ONLINE = [name for name in ALGORITHMS if resolve("algorithms", name).kind == "online"]


def engine_and_algorithm(
    family: Family, algorithm: dict[str, Any], task: str, *, micro_batch_views: int = 12, num_steps: int = 1
) -> tuple[LocalEngine, Algorithm[Any]]:
    data: dict[str, Any] = {
        "name": "test",
        "model": {"create": {"family": family.spec.name}},
        "algorithm": algorithm,
        "task": task,
        "train": {"micro_batch_views": micro_batch_views},
        "optimizer": {"lr": 3e-3},
    }
    recipe = parse_recipe(data, where="test")
    built = recipe.algorithm.build()
    engine = LocalEngine(
        recipe,
        copy.deepcopy(family),
        num_updates=num_steps,
        needs_reference=built.needs_reference,
        critic_lr=built.critic_lr,
    )
    return engine, built


def ragged_samples(family: Family) -> Samples:
    """Groups of two rows and of one, with advantages and a step map of one token per step."""
    prompts, completions = [[1, 2], [1, 2], [6, 3, 4]], [[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 2, 1], [17, 18, 19]]
    canvas = family.canvas(prompts, completions)
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(3),
        advantage_B=torch.tensor([1.0, -1.0, 0.5]),
        group_B=torch.tensor([0, 0, 1]),
        mask_id=family.spec.mask_id,
        step_map_BS=torch.where(canvas.is_completion_BS, canvas.is_completion_BS.cumsum(-1) - 1, -1),
        rollout_logp_BS=torch.zeros(canvas.input_BS.shape),
    )
    return with_records(samples)


def fine_tune(family: Family, *, micro_batch_views: int, num_steps: int) -> list[dict[str, float]]:
    """Metrics of SFT steps on one fixed batch of ragged rows."""
    engine, algorithm = engine_and_algorithm(
        family,
        {"name": "sft", "views_per_sample": 4},
        "chain_sum",
        micro_batch_views=micro_batch_views,
        num_steps=num_steps,
    )
    samples = ragged_samples(family)
    (iteration,) = plan_iterations(engine, algorithm, samples, Key(0), 1)
    return [update(engine, algorithm, samples, iteration) for _ in range(num_steps)]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_fine_tuning_lowers_the_loss(name: str) -> None:
    metrics = fine_tune(tiny_family(name), micro_batch_views=12, num_steps=12)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_expert_load_is_reported_and_does_not_depend_on_micro_batches(name: str) -> None:
    parts = [fine_tune(tiny_family(name), micro_batch_views=size, num_steps=1)[0] for size in (2, 12)]
    for metrics in parts:
        assert ("expert_imbalance" in metrics) is (name in MIXTURES)
        assert ("unused_experts" in metrics) is (name in MIXTURES)
    if name in MIXTURES:
        assert parts[0]["expert_imbalance"] == parts[1]["expert_imbalance"] >= 1.0
        assert 0.0 <= parts[0]["unused_experts"] == parts[1]["unused_experts"] < 1.0


@pytest.mark.parametrize("algorithm", ONLINE)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_algorithm_updates_every_family(name: str, algorithm: str) -> None:
    """Both passes of an update agree up to rounding, and the weights move."""
    family = tiny_family(name)
    engine, built = engine_and_algorithm(family, {"name": algorithm}, "countdown", micro_batch_views=2)
    samples = ragged_samples(family)
    (iteration,) = plan_iterations(engine, built, samples, Key(0), 1)
    metrics = update(engine, built, samples, iteration)
    assert metrics["grad_norm"] > 0
    assert metrics["replay_gap"] < 2e-5
    moved = zip(family.network.parameters(), engine.family.network.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in moved)
