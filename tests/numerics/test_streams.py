"""Several noisy streams on one clean stream: the numbers and gradients of separate passes, in fewer tokens."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.core.rng import Key
from dare.core.types import Canvas, Samples, Views
from dare.diffusion import blocks, corrupt
from dare.families.base import Family
from dare.families.layers.attention import SharedContext, attend
from dare.families.streams import pack_streams


def ragged_samples(family: Family, num: int = 4) -> Samples:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 20, (1 + 2 * row,), generator=generator).tolist() for row in range(num)]
    completions = [torch.randint(0, 20, (4 + 3 * (row % 3),), generator=generator).tolist() for row in range(num)]
    canvas = family.canvas(prompts, completions)
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(num),
        advantage_B=torch.zeros(num),
        group_B=torch.zeros(num, dtype=torch.int64),
        mask_id=family.spec.mask_id,
    )


def scored(family: Family, views: Views, canvas: Canvas) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and the gradient of a sum that tells views and positions apart."""
    family.network.zero_grad()
    logp_RS = family.view_logp(views, canvas)
    (logp_RS * torch.sin(torch.arange(logp_RS.numel())).view_as(logp_RS)).sum().backward()
    grads = {name: p.grad.clone() for name, p in family.network.named_parameters() if p.grad is not None}
    return logp_RS.detach(), grads


@pytest.mark.parametrize("num_views", [2, 3, 7])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_shared_streams_equal_separate_passes(families: dict[str, Family], num_views: int, is_ragged: bool) -> None:
    family = copy.deepcopy(families["sdar"]).to(torch.float64)
    samples = ragged_samples(family)
    views = corrupt.exact_count(samples, Key(1), num_views=num_views)
    if is_ragged:  # samples of unequal numbers of views, out of order
        views = views.rows(torch.tensor(Key(2).permutation(views.num_views))[: views.num_views - 1])
    canvas = samples.canvas.rows(views.sample_R)
    pack = pack_streams(views.sample_R, views.context_RS)
    assert pack is not None
    together, together_grads = scored(family, views, canvas)
    alone = dataclasses.replace(views, sample_R=torch.arange(views.num_views))  # no two views share a sample
    assert pack_streams(alone.sample_R, alone.context_RS) is None
    separate, separate_grads = scored(family, alone, canvas)
    torch.testing.assert_close(together, separate, rtol=1e-6, atol=1e-6)  # log-probs are float32
    for name, expected in separate_grads.items():
        torch.testing.assert_close(together_grads[name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_hidden_states_agree_to_the_last_digits(families: dict[str, Family]) -> None:
    family = copy.deepcopy(families["sdar"]).to(torch.float64)
    samples = ragged_samples(family)
    views = corrupt.exact_count(samples, Key(1), num_views=5)
    canvas = samples.canvas.rows(views.sample_R)
    position_RS = blocks.positions(canvas.is_real_BS)
    rest = (
        views.noisy_RS,
        views.context_RS,
        position_RS,
        canvas.block_BS,
        canvas.is_real_BS,
        canvas.is_real_BS,
        None,
        False,
    )
    alone = dataclasses.replace(views, sample_R=torch.arange(views.num_views))
    together_RSD, separate_RSD = family._noisy_hidden(views, *rest), family._noisy_hidden(alone, *rest)
    is_real_RS = canvas.is_real_BS
    torch.testing.assert_close(together_RSD[is_real_RS], separate_RSD[is_real_RS], rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), length=st.integers(1, 7), num_streams=st.integers(1, 3), width=st.integers(1, 4))
def test_shared_attention_is_the_dense_mask(data: Any, length: int, num_streams: int, width: int) -> None:
    """[clean | noisy_1..K] with the full mask written out: noisy sees itself in its block and clean earlier blocks."""
    num_real = data.draw(st.integers(1, length))
    block_1S = (torch.arange(length) // width)[None]
    is_real_1S = (torch.arange(length) < num_real)[None]
    stream_T = torch.arange(num_streams + 1).repeat_interleave(length)
    block_T, real_T = block_1S[0].repeat(num_streams + 1), is_real_1S[0].repeat(num_streams + 1)
    is_noisy_query, is_clean_key = (stream_T > 0)[:, None], (stream_T == 0)[None]
    visible = (~is_noisy_query & is_clean_key & (block_T[:, None] >= block_T[None])) | (
        is_noisy_query
        & (
            (is_clean_key & (block_T[:, None] > block_T[None]))
            | ((stream_T[:, None] == stream_T[None]) & (block_T[:, None] == block_T[None]))
        )
    )
    visible = visible & real_T[None] & real_T[:, None]
    visible = visible | (torch.eye(len(block_T), dtype=torch.bool) & ~real_T[:, None])
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, heads, len(block_T), 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    shared = SharedContext(num_streams, *blocks.shared_context_masks(block_1S, is_real_1S))
    dense = attend(query, key, value, visible[None, None])
    torch.testing.assert_close(attend(query, key, value, shared), dense, rtol=1e-12, atol=1e-12)


def test_packing_is_left_out_where_it_cannot_help(families: dict[str, Family]) -> None:
    samples = ragged_samples(families["sdar"])
    one_each = corrupt.all_masked(samples, Key(0))
    assert pack_streams(one_each.sample_R, one_each.context_RS) is None
    views = corrupt.exact_count(samples, Key(0), num_views=3)
    assert pack_streams(views.sample_R, views.context_RS) is not None
    other = views.context_RS.clone()
    other[1, 0] += 1  # one view of a sample corrupts its context differently
    assert pack_streams(views.sample_R, other) is None
    lonely = torch.tensor([0, 0, 0, 1, 2, 3])  # three samples would carry two unused streams each
    assert pack_streams(lonely, torch.zeros(6, 2)) is None


def test_packed_tokens_never_exceed_those_of_two_streams() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sample_R = torch.randint(0, 5, (int(torch.randint(1, 12, (1,), generator=generator)),), generator=generator)
        pack = pack_streams(sample_R, torch.zeros(len(sample_R), 1))
        if pack is not None:
            assert len(pack.first_G) * (pack.num_streams + 1) < 2 * len(sample_R)
            assert len(pack.slot_R.unique()) == len(sample_R)
            assert torch.equal(sample_R[pack.first_G][pack.slot_R // pack.num_streams], sample_R)
