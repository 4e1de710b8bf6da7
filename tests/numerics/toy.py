"""A masked-diffusion network in closed form, small enough to enumerate everything it can say.

Three tokens, mask id 3, absolute positions i from 0. With vis the positions that i sees and m the masks among them:

    logit_v(i) = sin(0.9 (v+1)(i+1)) + 0.2 sin((v+1) m) + theta sum_{j in vis, j != i, x_j != M} c_v(i, j)
    c_v(i, j)  = 0.5 cos(0.7 (v+1)(x_j + 1) + 0.3 (i - j))

Golden numbers of this model hold for the prompt [2], completion [0, 2, 1, 0] and theta = 1 (old 0.9, reference 0.8).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dare.core.types import Canvas, Samples, Views

VOCAB, MASK = 3, 3
PROMPT = [2]
COMPLETION = [0, 2, 1, 0]
NEW, OLD, REFERENCE = 1.0, 0.9, 0.8
ALL_COMPLETIONS = [list(tokens) for tokens in itertools.product(range(VOCAB), repeat=4)]


def logp(noisy_RS: Tensor, context_RS: Tensor, target_RS: Tensor, canvas: Canvas, theta: Tensor | float) -> Tensor:
    """float64 [R, S]: log-prob of every target; its own block is read from `noisy`, earlier ones from `context`."""
    length = noisy_RS.shape[1]
    position_S = torch.arange(length)
    block_RS = canvas.block_BS
    is_visible_RSS = canvas.is_real_BS[:, None, :].expand(-1, length, -1)
    seen_RSS = noisy_RS[:, None, :].expand_as(is_visible_RSS)
    if canvas.is_blockwise:
        is_visible_RSS = is_visible_RSS & (block_RS[:, None, :] <= block_RS[:, :, None])
        seen_RSS = torch.where(block_RS[:, None, :] == block_RS[:, :, None], seen_RSS, context_RS[:, None, :])
    factor_V = torch.arange(1, VOCAB + 1, dtype=torch.float64)
    num_masked_RS = (is_visible_RSS & (seen_RSS == MASK)).sum(-1)
    base_RSV = (0.9 * factor_V * (position_S[:, None] + 1)).sin() + 0.2 * (factor_V * num_masked_RS[..., None]).sin()
    distance_SS = (position_S[:, None] - position_S[None, :]).double()
    pair_RSSV = 0.5 * (0.7 * factor_V * (seen_RSS[..., None] + 1) + 0.3 * distance_SS[..., None]).cos()
    is_read_RSS = is_visible_RSS & (seen_RSS != MASK) & (distance_SS != 0)
    logits_RSV = base_RSV + theta * (pair_RSSV * is_read_RSS[..., None]).sum(2)
    safe_RS1 = target_RS.clamp(0, VOCAB - 1)[..., None]
    return logits_RSV.log_softmax(-1).gather(-1, safe_RS1)[..., 0]


def view_logp(views: Views, canvas: Canvas, theta: Tensor | float = NEW) -> Tensor:
    """What an engine would return for these views of the samples of `canvas`: 0 where nothing is scored."""
    rows = canvas.rows(views.sample_R)
    logp_RS = logp(views.noisy_RS, views.context_RS, views.target_RS, rows, theta)
    return torch.where(views.is_target_RS, logp_RS, 0.0)


def make_samples(
    completions: Sequence[Sequence[int]] = (COMPLETION,),
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    block_length: int | None = None,
    num_padding: int = 0,
    scored_lengths: Sequence[int] | None = None,
    step_maps: Sequence[Sequence[int]] | None = None,
    advantages: Sequence[float] | None = None,
    sample_ids: Sequence[int] | None = None,
) -> Samples:
    """Samples on a completion grid; `block_length` makes them blockwise, `num_padding` widens the canvas."""
    num = len(completions)
    prompts = [PROMPT] * num if prompts is None else prompts
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) + num_padding
    input_BS = torch.zeros((num, length), dtype=torch.int64)
    is_completion_BS = torch.zeros((num, length), dtype=torch.bool)
    is_real_BS = torch.zeros_like(is_completion_BS)
    is_scored_BS = torch.zeros_like(is_completion_BS)
    block_BS = torch.full_like(input_BS, -1)
    step_map_BS = torch.full_like(input_BS, -1)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion)
        input_BS[row, :end] = torch.tensor([*prompt, *completion])
        is_completion_BS[row, start:end] = True
        is_real_BS[row, :end] = True
        is_scored_BS[row, start : end if scored_lengths is None else start + scored_lengths[row]] = True
        block_BS[row, start:] = torch.arange(length - start) // (block_length or length)
        if step_maps is not None:
            step_map_BS[row, start:end] = torch.tensor(step_maps[row])
    return Samples(
        canvas=Canvas(input_BS, is_completion_BS, is_real_BS, block_BS, "block_causal" if block_length else "full"),
        is_scored_BS=is_scored_BS,
        sample_id_B=torch.arange(num) if sample_ids is None else torch.tensor(sample_ids),
        advantage_B=torch.zeros(num) if advantages is None else torch.tensor(advantages),
        group_B=torch.zeros(num, dtype=torch.int64),
        mask_id=MASK,
        step_map_BS=None if step_maps is None else step_map_BS,
    )


def masks_of(sets: Sequence[set[int]], samples: Samples) -> Tensor:
    """bool [1, M, S]: masks of the first sample from sets of completion positions."""
    start = int(samples.canvas.is_completion_BS[0].long().argmax())
    is_masked_MS = torch.zeros((len(sets), samples.canvas.length), dtype=torch.bool)
    for view, chosen in enumerate(sets):
        is_masked_MS[view, [start + k for k in chosen]] = True
    return is_masked_MS[None]


def subsets(length: int, size: int) -> list[set[int]]:
    return [set(chosen) for chosen in itertools.combinations(range(length), size)]
