"""The views of supervised training: which noise level, what it corrupts, and what a scored log-prob weighs.

One plan with orthogonal settings instead of one per paper:

    times        t per sample or per block, spread over views or blocks, in pairs (t, 1 - t) with complementary masks
    corruption   masks, each token's by itself or so many of a unit, the trailing EOS one by one or at once; random
                 tokens among what stays visible
    weight       w(t) of the ELBO, 1, 1 - t, or how much visible context a masked token has (CART)

Axes and keys are those of `corrupt.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt
from dare.diffusion.schedule import ScheduleName, find_schedule, spread_time

if TYPE_CHECKING:
    from torch import Tensor

_MAX_ROUNDS = 20  # of redrawing masks whose realised share is out of bounds

Weighting = Literal["elbo", "uniform", "one_minus_t", "cart"]
NumMasked = Literal["random", "exact", "rounded"]


@dataclass(frozen=True)
class Noise:
    """How dataset rows are corrupted; the fields are explained where the user sets them, in `SFTOptions`."""

    schedule: ScheduleName = "linear"
    t_min: float = 1e-3
    t_max: float = 1.0
    time_per: Literal["block", "sample"] = "block"
    time_spread: corrupt.TimeSpread = "views"
    num_views: int = 1
    num_masked: NumMasked = "random"
    is_complementary: bool = False
    weight: Weighting = "elbo"
    cart_p: float = 0.1
    is_eos_unit: bool = False
    is_rate_kept: bool = False
    edit_rate: float = 0.0
    edit_weight: float = 1.0
    vocab_size: int | None = None  # where random tokens come from; only for edit_rate > 0


def noised(samples: Samples, key: Key, noise: Noise) -> Views:
    """`noise.num_views` views per sample; weights are divided by their number, so that a sum over views is a mean.

    With weight "elbo", t_max = 1 and no edits, the sum over a sample's views estimates its ELBO up to a relative bias
    of about the mask probability at t_min. Complementary views are adjacent; their times are t and 1 - t, with t in
    [t_min, min(t_max, 1 - t_min)).
    """
    num_draws = noise.num_views // 2 if noise.is_complementary else noise.num_views
    t_max = min(noise.t_max, 1.0 - noise.t_min) if noise.is_complementary else noise.t_max
    is_time_per_block = noise.time_per == "block"
    scope = corrupt.scored_scope(samples)
    shares_BMS = corrupt.time_shares(samples, key, scope, num_draws, is_time_per_block, noise.time_spread)
    t_BMS = spread_time(shares_BMS, noise.t_min, t_max)
    uniform_BMS = corrupt.position_uniform(samples, key.fold("mask"), num_draws)
    if noise.is_rate_kept:
        rounds = (corrupt.position_uniform(samples, key.fold("mask", i), num_draws) for i in range(1, _MAX_ROUNDS))
        uniform_BMS = redrawn(samples, noise, t_BMS, uniform_BMS, rounds)
    views = masked(samples, noise, t_BMS, uniform_BMS)
    return _edited(views, samples, key.fold("edit"), noise) if noise.edit_rate > 0 else views


def masked(samples: Samples, noise: Noise, t_BMS: Tensor, uniform_BMS: Tensor) -> Views:
    """The views that these times and draws give: a scored token is masked where its draw is below p = 1 - alpha(t).

    Or, by `noise.num_masked`, so many tokens of each unit are (`counted`).
    """
    scope = corrupt.scored_scope(samples)
    if noise.is_eos_unit:
        uniform_BMS = _one_draw_per_tail(samples, uniform_BMS)
    probability_BMS = find_schedule(noise.schedule).mask_probability(t_BMS)
    if noise.num_masked == "random":
        is_drawn_BMS = uniform_BMS < probability_BMS
    else:
        is_drawn_BMS = counted(samples, probability_BMS, uniform_BMS, is_rounded=noise.num_masked == "rounded")
    if noise.is_complementary:
        is_drawn_BMS = torch.stack([is_drawn_BMS, ~is_drawn_BMS], dim=2).flatten(1, 2)
        t_BMS = torch.stack([t_BMS, 1.0 - t_BMS], dim=2).flatten(1, 2)
    is_masked_BMS = is_drawn_BMS & scope.is_maskable_BS[:, None]
    weight_BMS = weights(samples, noise, t_BMS, is_masked_BMS) / noise.num_views
    return corrupt.scoped_views(samples, scope, is_drawn_BMS, weight_BMS, temperature=1.0)


def counted(samples: Samples, probability_BMS: Tensor, uniform_BMS: Tensor, *, is_rounded: bool = False) -> Tensor:
    """bool [B, M, S]: ceil(p n) of the n scored tokens of each unit, a uniform random set, drawn.

    Over p uniform on [0, 1] the count is uniform on {1..n}: with weight n / count the mean is the ELBO, without the
    variance of a binomial count. `is_rounded`: round(p n) of them, later ones likelier. Draws are without replacement
    with weights 2^(4 (1 - p) i / n) at the i-th token (NeMo Automodel's noise, whose weight 1 / p makes it no bound;
    theirs also counts tokens that are not scored).
    """
    is_maskable_BS, unit_BS = corrupt.scored_scope(samples).is_maskable_BS, corrupt.unit_of(samples)
    size_BS, start_BS = corrupt.unit_sizes(unit_BS, is_maskable_BS)
    count_BMS = probability_BMS * size_BS[:, None]
    if not is_rounded:
        return corrupt.ranks(uniform_BMS, is_maskable_BS, unit_BS) < count_BMS.ceil()
    index_BS = is_maskable_BS.long().cumsum(-1) - 1 - start_BS
    place_B1S = (index_BS.double() / size_BS.clamp(min=1))[:, None]
    # The highest u^(1 / weight) first is a draw by weight (Efraimidis and Spirakis 2006); no draw may reach 1.
    inverse_BMS = torch.exp(-4.0 * math.log(2.0) * (1.0 - probability_BMS) * place_B1S)
    draw_BMS = (1.0 - uniform_BMS**inverse_BMS).clamp(max=1.0 - 1e-9)
    return corrupt.ranks(draw_BMS, is_maskable_BS, unit_BS) < count_BMS.round()


def redrawn(samples: Samples, noise: Noise, t_BMS: Tensor, uniform_BMS: Tensor, rounds: Iterable[Tensor]) -> Tensor:
    """Draws such that each unit's realised share of masks is within [t_min, t_max], as far as `rounds` last.

    Units out of it draw again at the same t (BD3-LM's resampling). A bound at the end of what t may be is none: t_min
    up to 1e-3, t_max 1. Units too short for any share within it keep their last draws.
    """
    scope, unit_BS = corrupt.scored_scope(samples), corrupt.unit_of(samples)
    probability_BMS = find_schedule(noise.schedule).mask_probability(t_BMS)
    size_B1S = corrupt.unit_sizes(unit_BS, scope.is_maskable_BS)[0][:, None]
    lowest, highest = (noise.t_min if noise.t_min > 1e-3 else 0.0), noise.t_max
    for again_BMS in rounds:
        draw_BMS = _one_draw_per_tail(samples, uniform_BMS) if noise.is_eos_unit else uniform_BMS
        is_masked_BMS = (draw_BMS < probability_BMS) & scope.is_maskable_BS[:, None]
        num_BMS = torch.stack([corrupt.unit_sizes(unit_BS, is_masked_BMS[:, m])[0] for m in range(t_BMS.shape[1])], 1)
        share_BMS = num_BMS.double() / size_B1S.clamp(min=1)
        is_out_BMS = ((share_BMS < lowest) | (share_BMS > highest)) & scope.is_maskable_BS[:, None]
        if not bool(is_out_BMS.any()):
            break
        uniform_BMS = torch.where(is_out_BMS, again_BMS, uniform_BMS)
    return uniform_BMS


def weights(samples: Samples, noise: Noise, t_BMS: Tensor, is_masked_BMS: Tensor) -> Tensor:
    """float64 [B, M, S]: what the loss of a masked token weighs at each position."""
    if noise.weight == "elbo":
        schedule = find_schedule(noise.schedule)
        weight_BMS = schedule.loss_weight(t_BMS)
        if noise.num_masked != "exact":
            return weight_BMS
        unit_BS = corrupt.unit_of(samples)
        size_BS = corrupt.unit_sizes(unit_BS, corrupt.scored_scope(samples).is_maskable_BS)[0]
        num_BMS = torch.stack([corrupt.unit_sizes(unit_BS, is_BS)[0] for is_BS in is_masked_BMS.unbind(1)], 1)
        return weight_BMS * schedule.mask_probability(t_BMS) * size_BS[:, None] / num_BMS.clamp(min=1)
    if noise.weight == "uniform":
        return torch.ones_like(t_BMS)
    if noise.weight == "one_minus_t":
        return 1.0 - t_BMS
    return context_weight(samples.canvas.is_real_BS[:, None] & ~is_masked_BMS, noise.cart_p)


def context_weight(is_visible_BMS: Tensor, p: float) -> Tensor:
    """float64 [B, M, S]: the sum over visible j != i of p (1 - p)^(|i - j| - 1) / 2, at most 1.

    Context-adaptive reweighting (CART, Dream): a masked token near visible ones weighs more. Two recurrences, one from
    each side, instead of an [S, S] matrix: linear in S, and padding cannot change the last digit.
    """
    share_BMS = is_visible_BMS.double() * (p / 2)
    total_BMS = torch.zeros_like(share_BMS)
    length = share_BMS.shape[-1]
    for columns in (range(length), range(length - 1, -1, -1)):
        seen_BM = torch.zeros_like(share_BMS[..., 0])
        for column in columns:
            total_BMS[..., column] += seen_BM
            seen_BM = seen_BM * (1 - p) + share_BMS[..., column]
    return total_BMS


def trailing_eos(samples: Samples) -> Tensor:
    """bool [B, S]: the EOS tokens that end each sample's scored tokens, without any token between them."""
    input_BS, is_scored_BS = samples.canvas.input_BS, samples.is_scored_BS
    eos_ids = torch.tensor(samples.eos_ids, dtype=torch.int64, device=input_BS.device)
    is_other_BS = is_scored_BS & ~torch.isin(input_BS, eos_ids)
    num_later_BS = is_other_BS.flip(-1).cumsum(-1).flip(-1)
    return is_scored_BS & (num_later_BS == 0)


def _one_draw_per_tail(samples: Samples, uniform_BMS: Tensor) -> Tensor:
    """The draw of the first trailing EOS decides for all of them.

    Dream's public code finds the first one by counting tokens that are not EOS, which is wrong for answers with an EOS
    inside; here it is where the run begins.
    """
    is_tail_BS = trailing_eos(samples)
    first_B11 = is_tail_BS.long().argmax(-1)[:, None, None]
    first_BM1 = uniform_BMS.gather(-1, first_B11.expand(-1, uniform_BMS.shape[1], -1))
    return torch.where(is_tail_BS[:, None], first_BM1, uniform_BMS)


def _edited(views: Views, samples: Samples, key: Key, noise: Noise) -> Views:
    """Of the scored tokens that stay visible a share is replaced by other tokens; all of them are targets.

    A replaced token is to be corrected, a kept one to be confirmed (LLaDA2.1's token-to-token training). A replacement
    is uniform over the vocabulary without the token itself and the mask. Their weight is flat: it is no bound.
    """
    if noise.vocab_size is None:
        raise ValueError("edits draw from the family's vocabulary, so they need an objective adapted to a family")
    num_views = noise.num_views
    is_visible_RS = samples.is_scored_BS[views.sample_R] & (views.noisy_RS != samples.mask_id)
    chance_RS = corrupt.position_uniform(samples, key.fold("place"), num_views).flatten(0, 1)
    share_RS = corrupt.position_uniform(samples, key.fold("token"), num_views).flatten(0, 1)
    token_RS = other_token(share_RS, views.target_RS, samples.mask_id, noise.vocab_size)
    is_replaced_RS = is_visible_RS & (chance_RS < noise.edit_rate)
    edit_weight = torch.tensor(noise.edit_weight / num_views)
    return dataclasses.replace(
        views,
        noisy_RS=torch.where(is_replaced_RS, token_RS, views.noisy_RS),
        is_target_RS=views.is_target_RS | is_visible_RS,
        weight_RS=torch.where(is_visible_RS, edit_weight, views.weight_RS),
    )


def other_token(uniform: Tensor, token: Tensor, mask_id: int, vocab_size: int) -> Tensor:
    """int64: a token uniform over the vocabulary without `token` and the mask, from numbers uniform on [0, 1)."""
    drawn = (uniform * (vocab_size - 2)).floor().long()
    lower, higher = token.clamp(max=mask_id), token.clamp(min=mask_id)
    drawn = drawn + (drawn >= lower).long()
    return drawn + (drawn >= higher).long()
