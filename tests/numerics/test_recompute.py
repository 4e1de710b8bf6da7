"""Memory for time: recomputed activations and other micro-batches change no bit, or nothing but rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.training.live_bytes import LiveBytes
from dare.training.micro_batches import micro_batches
from tests.conftest import tiny_family

FAMILIES = ("llada", "llada_moe", "dream", "sdar", "sdar_moe", "llada2")


def recipe(**train: Any) -> Recipe:
    data = {"name": "t", "model": {"path": "unused"}, "algorithm": "sft", "task": "chain_sum", "train": train}
    return parse_recipe(data, where="test")


def samples_of(family: Family, lengths: list[tuple[int, int]]) -> Samples:
    def ids(row: int, num: int, part: str) -> list[int]:
        uniform = Key(1).fold(part).uniform(torch.tensor(row), torch.arange(num))
        return [int(value * 20) for value in uniform]

    prompts = [ids(row, prompt, "prompt") for row, (prompt, _) in enumerate(lengths)]
    completions = [ids(row, completion, "completion") for row, (_, completion) in enumerate(lengths)]
    canvas = family.canvas(prompts, completions)
    num = len(lengths)
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.arange(num),
        advantage_B=torch.zeros(num),
        group_B=torch.arange(num),
        mask_id=family.spec.mask_id,
    )


def accumulate(family: Family, samples: Samples, views: Views, **train: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one accumulation, from the same weights every time."""
    own = copy.deepcopy(family)
    engine = LocalEngine(recipe(**train), own, num_updates=1, needs_reference=False)
    grad_RS = torch.where(views.is_target_RS, -0.1, 0.0)
    logp_RS = engine.accumulate(views, samples, grad_RS)
    return logp_RS, {name: p.grad for name, p in own.network.named_parameters() if p.grad is not None}


LENGTHS = [(3, 9), (8, 4), (1, 14), (5, 8), (12, 12)]


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputing_changes_no_bit(name: str) -> None:
    family = tiny_family(name)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(2), num_views=2)
    logp_RS, grads = accumulate(family, samples, views)
    for recompute in ("selective", "full"):
        other_RS, others = accumulate(family, samples, views, recompute=recompute)
        torch.testing.assert_close(other_RS, logp_RS, atol=0, rtol=0, equal_nan=True)
        assert others.keys() == grads.keys()
        for parameter, grad in grads.items():
            assert torch.equal(others[parameter], grad), parameter


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_recomputing_takes_less_memory(name: str) -> None:
    """Bytes of the tensors that a forward leaves for its backward, counted."""
    family = tiny_family(name)
    samples = samples_of(family, [(8, 56)] * 8)
    views = corrupt.bernoulli(samples, Key(2), num_views=1)
    kept: list[int] = []
    for recompute in ("none", "selective", "full"):
        family.network.recompute = recompute  # type: ignore[assignment]
        with LiveBytes() as count:
            hidden_RTD = family.view_hidden(views, samples.canvas.rows(views.sample_R))
        assert hidden_RTD.requires_grad
        kept.append(count.live)
    assert kept[2] < kept[1] < kept[0]
    assert kept[2] < kept[0] / 3


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_change_rounding_only(name: str) -> None:
    family = tiny_family(name)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(2), num_views=2)
    logp_RS, grads = accumulate(family, samples, views)
    for train in ({"micro_batch_views": 1}, {"micro_batch_views": 3}, {"micro_batch_tokens": 40}):
        other_RS, others = accumulate(family, samples, views, **train)
        torch.testing.assert_close(other_RS, logp_RS, atol=1e-5, rtol=0, equal_nan=True)
        for parameter, grad in grads.items():
            torch.testing.assert_close(others[parameter], grad, atol=1e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 7), st.integers(1, 120))
def test_every_view_is_run_once_within_the_limits(lengths: list[int], max_views: int, max_tokens: int) -> None:
    length_R = torch.tensor(lengths, dtype=torch.int64)
    parts = micro_batches(length_R, max_views=max_views, max_tokens=max_tokens)
    assert sorted(index for part in parts for index in part.tolist()) == list(range(len(lengths)))
    for part in parts:
        assert 1 <= len(part) <= max_views
        assert len(part) == 1 or len(part) * int(length_R[part].max()) <= max_tokens
    flat = [length for part in parts for length in length_R[part].tolist()]
    assert flat == sorted(lengths, reverse=True)


def test_views_of_equal_length_keep_their_order() -> None:
    parts = micro_batches(torch.tensor([4, 4, 9, 9, 4, 4]), max_views=2, max_tokens=100)
    assert [part.tolist() for part in parts] == [[2, 3], [0, 1], [4, 5]]


def test_live_bytes_follow_tensors() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as count:
        first = outside + 1.0
        assert count.live == first.nbytes
        view = first[:10]  # a view takes no memory of its own
        outside.add_(1.0)  # neither does what was there before
        assert count.live == first.nbytes
        second = first.double()
        assert count.live == first.nbytes + second.nbytes
        del first
        assert count.live == 4000 + second.nbytes  # the view still holds it
        del view, second
        assert count.live == 0
    assert count.peak == 4000 + 8000
