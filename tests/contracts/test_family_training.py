"""Every row of the families table is trained by the same code, and mixtures report how their experts are used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dare.core.recipe import parse_recipe
from dare.core.registry import FAMILIES
from dare.core.rng import Key
from dare.core.types import Samples
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.training.update import plan_iterations, update
from tests.conftest import tiny_family

MIXTURES = {"llada_moe", "sdar_moe", "llada2"}


def fine_tune(family: Family, *, micro_batch_views: int, num_steps: int) -> list[dict[str, float]]:
    """Metrics of SFT steps on one fixed batch of ragged rows."""
    data: dict[str, Any] = {
        "name": "test",
        "model": {"create": {"family": "llada"}},
        "algorithm": {"name": "sft", "views_per_sample": 4},
        "task": "chain_sum",
        "train": {"micro_batch_views": micro_batch_views},
        "optimizer": {"lr": 3e-3},
    }
    recipe = parse_recipe(data, where="test")
    engine = LocalEngine(recipe, copy.deepcopy(family), num_updates=num_steps, needs_reference=False)
    prompts, completions = [[1, 2], [3, 4, 5], [6]], [[7, 8, 9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19]]
    canvas = family.canvas(prompts, completions)
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(3),
        advantage_B=torch.zeros(3),
        group_B=torch.arange(3),
        mask_id=family.spec.mask_id,
    )
    algorithm = recipe.algorithm.build()
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
