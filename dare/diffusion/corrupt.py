"""Who is masked: plans that turn samples into views. Views are data, drawn once and scored by every policy.

    plan            masked                                       weight of a scored log-prob
    all_masked      the whole completion (and prompt noise)      1
    bernoulli       each token with probability 1 - alpha(t)     w(t) / N
    exact_count     l tokens, l uniform                          n / l / N
    coupled_*       a set and its complement                     see there
    trace_replay    what the rollout had not yet committed       1

n is the number of maskable positions of a *unit*. Unit: where blocks are scored given the clean blocks before them
(`canvas.is_blockwise`), every block, all of them in each view; else the whole completion.

Every draw is keyed by (key, sample id, view, position counted from the first completion position), so the views of a
sample depend neither on its batch mates nor on padding.

Axes: B samples, M views per sample, S canvas length, R = B x M views, sample-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dare.core.errors import DareError
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion.counts import rounded_counts, stratified_counts
from dare.diffusion.schedule import ScheduleName, find_schedule, spread_time, stratum

if TYPE_CHECKING:
    from torch import Tensor

# Which noise levels of a sample are kept apart: those of its views, also those of its blocks, or none.
TimeSpread = Literal["views", "blocks", "none"]


@dataclass(frozen=True)
class Scope:
    """What a plan may do to each position; everything else stays as it is.

    is_maskable_BS  masked at random
    is_target_BS    scored where it is masked
    is_hidden_BS    masked in every view and never scored
    """

    is_maskable_BS: Tensor
    is_target_BS: Tensor
    is_hidden_BS: Tensor


def scored_scope(samples: Samples) -> Scope:
    """The scored positions, and nothing else: unscored completion positions stay visible."""
    is_scored_BS = samples.is_scored_BS & _is_sampled(samples)
    return Scope(is_scored_BS, is_scored_BS, torch.zeros_like(is_scored_BS))


def completion_scope(samples: Samples, tail: Literal["corrupted", "scored", "keep_masked"]) -> Scope:
    """All completion positions, by what happens to the tail after the first EOS.

    "corrupted"    masked at random like the rest, never scored (Coupled-GRPO)
    "scored"       masked and scored like the rest (ESPO)
    "keep_masked"  masked in every view, never scored
    """
    is_completion_BS = samples.canvas.is_completion_BS & _is_sampled(samples)
    is_scored_BS = samples.is_scored_BS & is_completion_BS
    none_BS = torch.zeros_like(is_scored_BS)
    if tail == "scored":
        return Scope(is_completion_BS, is_completion_BS, none_BS)
    if tail == "corrupted":
        return Scope(is_completion_BS, is_scored_BS, none_BS)
    return Scope(is_scored_BS, is_scored_BS, is_completion_BS & ~is_scored_BS)


def all_masked(samples: Samples, key: Key, *, prompt_noise: float = 0.0, temperature: float = 1.0) -> Views:
    """One view per sample: every completion position masked, the scored ones are targets, weight 1.

    prompt_noise  probability with which each real position outside the completion is masked too; where blocks are
                  scored given a clean context, the context carries the same noise
    """
    canvas = samples.canvas
    is_completion_BMS = canvas.is_completion_BS[:, None]
    uniform_BMS = position_uniform(samples, key.fold("prompt"), num_views=1)
    is_prompt_BMS = (canvas.is_real_BS & ~canvas.is_completion_BS)[:, None]
    return assemble(
        samples,
        is_completion_BMS,
        scored_scope(samples).is_target_BS[:, None],
        torch.ones(is_completion_BMS.shape, device=is_completion_BMS.device),
        is_noise_BMS=is_prompt_BMS & (uniform_BMS < prompt_noise),
        temperature=temperature,
    )


def bernoulli(
    samples: Samples,
    key: Key,
    *,
    num_views: int,
    schedule: ScheduleName = "linear",
    t_min: float = 1e-3,
    t_max: float = 1.0,
    is_time_per_block: bool = True,
    is_stratified: bool = True,
    scope: Scope | None = None,
    temperature: float = 1.0,
) -> Views:
    """`num_views` views per sample: t uniform on [t_min, t_max), each scored token masked with p = 1 - alpha(t).

    Weight w(t) / num_views: with t_max = 1 the sum over a sample's views estimates its ELBO up to a relative bias
    O(t_min).

    is_time_per_block  blockwise samples: one t per block (BD3-LM) instead of one per sample (SDAR)
    is_stratified      the times of a sample's views are evenly spaced from a common random start, modulo 1, so that
                       each view's own law stays uniform. BD3-LM spreads them over the batch instead, which ties a
                       block's noise level to its row
    scope              what may be masked and scored; default: the scored positions
    """
    scope = scored_scope(samples) if scope is None else scope
    spread: TimeSpread = "views" if is_stratified else "none"
    shares_BMS = time_shares(samples, key, scope, num_views, is_time_per_block, spread)
    t_BMS = spread_time(shares_BMS, t_min, t_max)
    noise = find_schedule(schedule)
    is_drawn_BMS = position_uniform(samples, key.fold("mask"), num_views) < noise.mask_probability(t_BMS)
    return scoped_views(samples, scope, is_drawn_BMS, noise.loss_weight(t_BMS) / num_views, temperature)


def coupled_bernoulli(
    samples: Samples,
    key: Key,
    *,
    num_pairs: int,
    t_min: float,
    t_max: float,
    weight: float,
    temperature: float = 1.0,
) -> Views:
    """1 + 2 * `num_pairs` views per sample: all masked, then pairs of a Bernoulli(t) mask and its complement.

    Weights `weight`, weight / t and weight / (1 - t); t is uniform on [t_min, t_max), one per pair of a sample. Each
    scored token is a target of the first view and of exactly one view of each pair (Coupled-GRPO, Gong et al. 2025).
    """
    scope = completion_scope(samples, "corrupted")
    shares_BMS = time_shares(samples, key, scope, num_pairs, is_time_per_block=False, spread="none")
    t_BMS = spread_time(shares_BMS, t_min, t_max)
    is_drawn_BMS = position_uniform(samples, key.fold("mask"), num_pairs) < t_BMS
    pair_weight_BMS = weight / torch.where(is_drawn_BMS, t_BMS, 1.0 - t_BMS)
    is_pair_BMS, pair_weight_BMS = _with_complement(is_drawn_BMS, pair_weight_BMS)
    is_all_B1S = torch.ones_like(is_pair_BMS[:, :1])
    full_weight_B1S = torch.full_like(pair_weight_BMS[:, :1], weight)
    is_drawn_BMS = torch.cat([is_all_B1S, is_pair_BMS], dim=1)
    return scoped_views(samples, scope, is_drawn_BMS, torch.cat([full_weight_B1S, pair_weight_BMS], dim=1), temperature)


def exact_count(
    samples: Samples,
    key: Key,
    *,
    num_views: int,
    lowest: Literal[0, 1] = 1,
    scope: Scope | None = None,
    is_rounded: bool = False,
    temperature: float = 1.0,
) -> Views:
    """`num_views` views per sample, each with exactly l of the n positions of a unit masked.

    l is uniform on {lowest..n}, stratified over the views of the sample (`stratified_counts`); weight
    (n + 1 - lowest) / l / num_views. The sum over a sample's views is an unbiased estimate of its ELBO (LLaDA, Nie et
    al. 2025; ESPO starts at 0 and then one draw in n + 1 scores nothing). `scope`: default the scored positions.
    With `is_rounded` l follows `rounded_counts`, the biased law of the public code.
    """
    scope = scored_scope(samples) if scope is None else scope
    is_drawn_BMS, weight_BMS = _draw_counts(samples, key, scope, num_views, lowest, is_rounded)[:2]
    return scoped_views(samples, scope, is_drawn_BMS, weight_BMS, temperature)


def coupled_exact_count(samples: Samples, key: Key, *, num_pairs: int, scope: Scope, temperature: float = 1.0) -> Views:
    """2 * `num_pairs` views per sample: l of the n maskable positions of a unit, l uniform on {0..n}, then the others.

    Weights (n + 1) / (2l) and (n + 1) / (2(n - l)) over num_pairs; the sum over a sample's views is an unbiased
    estimate of its ELBO (ESPO, Ou et al. 2025).
    """
    is_drawn_BMS, weight_BMS, rest_weight_BMS = _draw_counts(samples, key, scope, num_pairs, lowest=0)
    pair_weight_BMS = 0.5 * torch.where(is_drawn_BMS, weight_BMS, rest_weight_BMS)
    return scoped_views(samples, scope, *_with_complement(is_drawn_BMS, pair_weight_BMS), temperature)


def trace_replay(samples: Samples, is_target_BS: Tensor, *, shrink: int = 1, temperature: float = 1.0) -> Views:
    """One view per denoising step of a unit: what the rollout saw before the step, scoring what the step committed.

    Step r of every block is replayed in the same view, as blocks are independent given the clean blocks before them.
    View r masks what was committed in step r or later, or never. Each position of `is_target_BS` (bool [B, S]) that
    was sampled is a target of exactly one view, weight 1; views without a target are left out. `view_R` is r.
    `shrink` > 1 replays that many consecutive steps of a unit as one (TraceRL, Wang et al. 2025): fewer views, whose
    log-probs are no longer those of the rollout.
    Raises DareError for samples without a step map.
    """
    if samples.step_map_BS is None:
        raise DareError(
            "these samples have no step map", expected="rollouts", fix="train on rollouts, not dataset rows"
        )
    rank_BS = step_ranks(samples.step_map_BS, unit_of(samples))
    rank_BS = torch.where(rank_BS < 0, rank_BS, rank_BS // shrink)
    num_steps = int(rank_BS.max()) + 1
    step_1M1 = torch.arange(num_steps, device=rank_BS.device)[None, :, None]
    is_target_BMS = (rank_BS[:, None] == step_1M1) & is_target_BS[:, None]
    return assemble(
        samples,
        rank_BS[:, None] >= step_1M1,
        is_target_BMS,
        torch.ones(is_target_BMS.shape, device=is_target_BMS.device),
        is_kept_BM=is_target_BMS.any(-1),
        temperature=temperature,
    )


def step_ranks(step_map_BS: Tensor, unit_BS: Tensor) -> Tensor:
    """int64 [B, S]: how many earlier steps committed something in the position's own unit; -1 where none did there.

    Ranks of a unit are contiguous from 0 and do not change when steps are relabelled monotonically.
    """
    length = step_map_BS.shape[1]
    is_sampled_BS = step_map_BS >= 0
    stride = int(step_map_BS.clamp(min=0).max()) + 1
    # Sorted by (unit, step), unsampled positions first, a unit's rank grows by one wherever the step changes.
    label_BS = torch.where(is_sampled_BS, unit_BS * stride + step_map_BS, -1)
    label_BS, order_BS = label_BS.sort(dim=-1, stable=True)
    unit_BS = torch.where(label_BS < 0, -1, label_BS // stride)
    is_new_BS = torch.ones_like(is_sampled_BS)
    is_new_BS[:, 1:] = label_BS[:, 1:] != label_BS[:, :-1]
    is_first_BS = torch.ones_like(is_sampled_BS)
    is_first_BS[:, 1:] = unit_BS[:, 1:] != unit_BS[:, :-1]
    index_BS = is_new_BS.long().cumsum(-1)
    first_BS = torch.where(is_first_BS, index_BS, 0).cummax(-1).values
    rank_BS = torch.where(label_BS < 0, -1, index_BS - first_BS)
    return torch.empty((len(rank_BS), length), dtype=torch.int64, device=rank_BS.device).scatter(-1, order_BS, rank_BS)


def assemble(
    samples: Samples,
    is_masked_BMS: Tensor,
    is_target_BMS: Tensor,
    weight_BMS: Tensor,
    *,
    is_noise_BMS: Tensor | None = None,
    is_kept_BM: Tensor | None = None,
    temperature: float = 1.0,
) -> Views:
    """Views from M masks per sample, sample-major. Every plan ends here.

    is_masked_BMS  bool   holds the mask token in the noisy stream
    is_target_BMS  bool   scored
    weight_BMS     float  weight of the log-prob; set to 0 where not scored
    is_noise_BMS   bool   holds the mask token in both streams
    is_kept_BM     bool   views to keep; default all
    """
    batch_size, num_views, _ = is_masked_BMS.shape
    device = is_masked_BMS.device
    sample_BM = torch.arange(batch_size, device=device)[:, None].expand(batch_size, num_views)
    view_BM = torch.arange(num_views, device=device)[None].expand(batch_size, num_views)
    kept = torch.ones_like(view_BM, dtype=torch.bool) if is_kept_BM is None else is_kept_BM
    clean_RS = samples.canvas.input_BS[sample_BM[kept]]
    is_noise_RS = torch.zeros_like(clean_RS, dtype=torch.bool) if is_noise_BMS is None else is_noise_BMS[kept]
    is_target_RS = is_target_BMS[kept]
    return Views(
        noisy_RS=torch.where(is_masked_BMS[kept] | is_noise_RS, samples.mask_id, clean_RS),
        context_RS=torch.where(is_noise_RS, samples.mask_id, clean_RS),
        target_RS=clean_RS,
        is_target_RS=is_target_RS,
        weight_RS=torch.where(is_target_RS, weight_BMS[kept], 0.0).float(),
        sample_R=sample_BM[kept],
        view_R=view_BM[kept],
        temperature=temperature,
    )


def scoped_views(samples: Samples, scope: Scope, is_drawn_BMS: Tensor, weight_BMS: Tensor, temperature: float) -> Views:
    is_masked_BMS = is_drawn_BMS & scope.is_maskable_BS[:, None]
    is_target_BMS = is_masked_BMS & scope.is_target_BS[:, None]
    is_masked_BMS = is_masked_BMS | scope.is_hidden_BS[:, None]
    return assemble(samples, is_masked_BMS, is_target_BMS, weight_BMS, temperature=temperature)


def _with_complement(is_drawn_BMS: Tensor, weight_BMS: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the views, each followed by its complement. A token is drawn in one of the two: one weight serves both."""
    is_pair_BMS = torch.stack([is_drawn_BMS, ~is_drawn_BMS], dim=2).flatten(1, 2)
    return is_pair_BMS, weight_BMS.repeat_interleave(2, dim=1)


def _draw_counts(
    samples: Samples, key: Key, scope: Scope, num_views: int, lowest: int, is_rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """is_drawn_BMS; the weight C / l / N of a drawn position and C / (n - l) / N of a position that is not."""
    unit_BS = unit_of(samples)
    size_BS, _ = unit_sizes(unit_BS, scope.is_maskable_BS)
    view_1M1 = torch.arange(num_views, device=unit_BS.device)[None, :, None]
    uniform_BS = key.fold("count").uniform(samples.sample_id_B[:, None], unit_BS)
    size_B1S = size_BS.clamp(min=1)[:, None]
    law = rounded_counts if is_rounded else stratified_counts
    count_BMS = law(uniform_BS[:, None], size_B1S, num_views, lowest, view_1M1)
    rank_BMS = random_ranks(samples, key.fold("mask"), scope.is_maskable_BS, unit_BS, num_views)
    scale_B1S = (size_B1S + 1 - lowest).double() / num_views
    weight_BMS = scale_B1S / count_BMS.clamp(min=1)
    rest_weight_BMS = scale_B1S / (size_B1S - count_BMS).clamp(min=1)
    return rank_BMS < count_BMS, weight_BMS, rest_weight_BMS


def random_ranks(samples: Samples, key: Key, is_maskable_BS: Tensor, unit_BS: Tensor, num_views: int) -> Tensor:
    """int64 [B, M, S]: the place of each maskable position in a uniform random order of its unit; from 0.

    Masking the places below l masks a uniform random set of l positions. What is not maskable comes last.
    """
    return ranks(position_uniform(samples, key, num_views), is_maskable_BS, unit_BS)


def ranks(draw_BMS: Tensor, is_maskable_BS: Tensor, unit_BS: Tensor) -> Tensor:
    """int64 [B, M, S]: the place of each maskable position among those of its unit by draw, in [0, 1); from 0."""
    label_BMS = torch.where(is_maskable_BS[:, None], unit_BS[:, None] + draw_BMS, torch.inf)
    order_BMS = label_BMS.argsort(dim=-1, stable=True)
    index_BMS = torch.arange(order_BMS.shape[-1], device=unit_BS.device).expand_as(order_BMS)
    _, start_BS = unit_sizes(unit_BS, is_maskable_BS)
    return torch.empty_like(order_BMS).scatter(-1, order_BMS, index_BMS) - start_BS[:, None]


def unit_of(samples: Samples) -> Tensor:
    """int64 [B, S]: the unit of each completion position; 0 outside (where it is never used)."""
    block_BS = samples.canvas.block_BS
    if not samples.canvas.is_blockwise:
        return torch.zeros_like(block_BS)
    return torch.where(samples.canvas.is_completion_BS, block_BS, 0)


def unit_sizes(unit_BS: Tensor, is_maskable_BS: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B, S] each: maskable positions in the position's own unit, and in all units before it."""
    num_units = int(unit_BS.max()) + 1
    zero_BU = torch.zeros((len(unit_BS), num_units), dtype=torch.int64, device=unit_BS.device)
    size_BU = zero_BU.scatter_add(1, unit_BS, is_maskable_BS.long())
    start_BU = size_BU.cumsum(1) - size_BU
    return size_BU.gather(1, unit_BS), start_BU.gather(1, unit_BS)


def time_shares(
    samples: Samples, key: Key, scope: Scope, num_views: int, is_time_per_block: bool, spread: TimeSpread
) -> Tensor:
    """float64 [B, M, S] in [0, 1): uniform for each unit and view, equal within a unit."""
    unit_BS = unit_of(samples) if is_time_per_block else torch.zeros_like(samples.canvas.block_BS)
    sample_id_B11 = samples.sample_id_B[:, None, None]
    view_1M1 = torch.arange(num_views, device=unit_BS.device)[None, :, None]
    if spread == "none":
        return key.fold("time").uniform(sample_id_B11, unit_BS[:, None], view_1M1)
    share_B1S = key.fold("time").uniform(sample_id_B11, unit_BS[:, None])
    if spread == "blocks":
        place_BS, num_B1 = _random_places(samples, key.fold("place"), unit_BS, scope.is_maskable_BS)
        share_B1S = stratum(share_B1S, place_BS[:, None], num_B1[:, None])
    return (share_B1S + view_1M1.double() / num_views) % 1.0


def _random_places(samples: Samples, key: Key, unit_BS: Tensor, is_maskable_BS: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B, S] and [B, 1]: each unit's place in a random order of the sample's maskable units, and their number."""
    unit_U = torch.arange(int(unit_BS.max()) + 1, device=unit_BS.device)
    is_used_BU = torch.zeros((len(unit_BS), len(unit_U)), dtype=torch.int64, device=unit_BS.device)
    is_used_BU = is_used_BU.scatter_add(1, unit_BS, is_maskable_BS.long()) > 0
    label_BU = torch.where(is_used_BU, key.uniform(samples.sample_id_B[:, None], unit_U[None]), torch.inf)
    place_BU = label_BU.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return place_BU.gather(1, unit_BS), is_used_BU.sum(-1, keepdim=True).clamp(min=1)


def position_uniform(samples: Samples, key: Key, num_views: int) -> Tensor:
    """float64 [B, M, S] in [0, 1), one for each sample, view and position relative to the completion's first."""
    is_completion_BS = samples.canvas.is_completion_BS
    start_B1 = is_completion_BS.long().argmax(-1, keepdim=True)
    offset_BS = torch.arange(is_completion_BS.shape[1], device=start_B1.device)[None] - start_B1
    view_1M1 = torch.arange(num_views, device=start_B1.device)[None, :, None]
    return key.uniform(samples.sample_id_B[:, None, None], view_1M1, offset_BS[:, None])


def _is_sampled(samples: Samples) -> Tensor:
    """False where a rollout ended before the position was sampled: it holds the mask token, which no view can score."""
    return samples.canvas.input_BS != samples.mask_id
