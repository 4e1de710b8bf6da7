"""The last layer computes outputs only where they are read: log-probs and gradients are those of computing all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt
from dare.families.base import Family
from dare.families.layers.moe import ExpertLoad
from dare.families.reading import read_at
from tests.golden_checkpoints import load_golden

FAMILIES = ("llada", "dream", "sdar", "llada_moe", "sdar_moe", "llada2_0")


def case(family: Family, num_views: int) -> tuple[Samples, Views]:
    """Rows of different lengths; the second one has no target in its last views."""
    rows = [([3, 1, 4], [1, 5, 9, 2, 6]), ([7], [8, 8]), ([2, 7, 1, 8], [3, 3, 3, 1, 2, 9, 4])]
    canvas = family.canvas([prompt for prompt, _ in rows], [completion for _, completion in rows], 4)
    num = len(rows)
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.arange(num),
        advantage_B=torch.zeros(num),
        group_B=torch.arange(num),
        mask_id=family.spec.mask_id,
    )
    views = corrupt.bernoulli(samples, Key(4), num_views=num_views)
    views.is_target_RS[num_views : 2 * num_views][-1] = False
    return samples, views


def weighted_sum(family: Family, hidden_RTD: Tensor, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of a weighted sum of them."""
    family.network.zero_grad(set_to_none=True)
    factor_RS = torch.linspace(-1.0, 1.0, views.noisy_RS.numel()).view_as(views.noisy_RS) * views.is_target_RS
    total, logp_RS = family.target_total(hidden_RTD, views, factor_RS)
    total.backward()
    named = family.network.named_parameters()
    return logp_RS, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_read_changes_nothing(name: str, num_views: int, is_packed: bool) -> None:
    """Block models with three views share a clean stream."""
    family = load_golden(name)
    samples, views = case(family, num_views)
    canvas = samples.canvas.rows(views.sample_R)
    results = []
    for is_read_RS in (None, views.is_target_RS):
        hidden_RTD = family.view_hidden(views, canvas, is_packed=is_packed, is_read_RS=is_read_RS)
        results.append(weighted_sum(family, hidden_RTD, views))
    (every_RS, every), (read_RS, read) = results
    torch.testing.assert_close(read_RS, every_RS, rtol=0, atol=1e-5)
    assert every.keys() == read.keys()
    for parameter, grad in every.items():
        assert float((read[parameter] - grad).norm()) <= 1e-5 * float(grad.norm()), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_runs_the_read_tokens_only(name: str) -> None:
    family = load_golden(name)
    samples, views = case(family, 1)
    num_tokens: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        num_tokens.append(output.shape[:-1].numel())

    first, last = (
        layer.register_forward_hook(count) for layer in (family.network.layers[0], family.network.layers[-1])
    )
    load = ExpertLoad()
    family.view_hidden(views, samples.canvas, load, is_read_RS=views.is_target_RS)
    first.remove()
    last.remove()
    is_two_streams = family.spec.attention == "block_causal"
    assert num_tokens[0] == views.noisy_RS.numel() * (2 if is_two_streams else 1)
    if not family.spec.is_shifted:  # two targets may share a source there
        assert num_tokens[1] == int(views.is_target_RS.sum())
    assert num_tokens[1] <= int(views.is_target_RS.sum())
    if "moe" in name:
        assert load._count_LE is not None
        per_layer = load._count_LE.sum(-1)
        assert int(per_layer[0]) == 2 * int(samples.canvas.is_real_BS.sum())
        assert int(per_layer[-1]) == 2 * int(views.is_target_RS.sum())


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_a_forward_whose_result_nobody_reads_still_has_a_graph(name: str, is_packed: bool) -> None:
    """Processes that hold shards of one network run such forwards to keep in step with the others."""
    family = load_golden(name)
    samples, views = case(family, 1)
    views.is_target_RS[:] = False
    hidden_RTD = family.view_hidden(views, samples.canvas, is_packed=is_packed, is_read_RS=views.is_target_RS)
    assert hidden_RTD.requires_grad
    logp_RS, grads = weighted_sum(family, hidden_RTD, views)
    assert not logp_RS.any()
    assert not any(bool(grad.any()) for grad in grads.values())


def test_columns_that_attend() -> None:
    """As many as the fullest row reads; the places of the read ones among them."""
    is_read_BT = torch.tensor([[False, True, False, True], [False, False, True, False]])
    read = read_at(is_read_BT, None)
    assert read.column_RQ is not None
    assert read.column_RQ.shape == (2, 2)
    flat = read.column_RQ.flatten()[read.place_N].tolist()
    assert flat == [1, 3, 2]
    assert read_at(torch.ones(2, 4, dtype=torch.bool), None).column_RQ is None
