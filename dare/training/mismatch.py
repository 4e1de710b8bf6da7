"""Does the trainer see what the rollout saw? Both log-probs of the same tokens, where a view is a state of the rollout.

They differ where the rollout approximates (stale caches), runs in another precision or engine, or has older weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.types import UNSAMPLED, Samples, Views

_NEVER = 1 << 40  # later than any step


def mismatch(logp_RS: Tensor, views: Views, samples: Samples) -> dict[str, float]:
    """Metrics over the scored tokens whose view is the canvas that they were committed from; empty if there are none.

    logp_RS  the trainer's log-probs before its first update; NaN where they are not known

    rollout_gap     nats: the mean |d|
    mismatch_kl     nats per token: KL(rollout || trainer), the mean of exp(d) - 1 - d with d = trainer - rollout
    mismatch_max    nats: the largest |d|
    mismatch_share  part of the scored tokens that could be compared
    """
    if samples.rollout_logp_BS is None or samples.step_map_BS is None or samples.is_rewritten:
        return {}
    is_same_RS = is_rollout_state(views, samples) & ~logp_RS.isnan()
    num_same = int(is_same_RS.sum())
    if not num_same:
        return {}
    gap_N = logp_RS.double()[is_same_RS] - samples.rollout_logp_BS[views.sample_R].double()[is_same_RS]
    return {
        "rollout_gap": float(gap_N.abs().mean()),
        "mismatch_kl": float((gap_N.expm1() - gap_N).mean()),
        "mismatch_max": float(gap_N.abs().max()),
        "mismatch_share": num_same / int(views.is_target_RS.sum()),
    }


def is_rollout_state(views: Views, samples: Samples) -> Tensor:
    """bool [R, S]: the targets whose view masks and shows what the rollout did when it committed them.

    That is decided from the view itself, whatever algorithm drew it: all that was committed earlier is shown, nothing
    else of the completion is, at the rollout's temperature. For block models within the target's block; the blocks
    before it must be those of the sample.
    """
    canvas, step_map_BS = samples.canvas.rows(views.sample_R), samples.step_map_BS
    if step_map_BS is None or views.temperature != samples.rollout_temperature:
        return torch.zeros_like(views.is_target_RS)
    is_masked_RS = views.noisy_RS == samples.mask_id
    step_RS = step_map_BS[views.sample_R]
    step_RS = torch.where(step_RS == UNSAMPLED, _NEVER, step_RS)
    is_shown_RS = ~is_masked_RS & canvas.is_real_BS
    is_wrong_RS = is_shown_RS & (views.noisy_RS != canvas.input_BS)
    scope_RS = canvas.block_BS if canvas.is_blockwise else torch.zeros_like(canvas.block_BS)
    first_masked_RS = _least(torch.where(is_masked_RS & canvas.is_real_BS, step_RS, _NEVER), scope_RS)
    last_shown_RS = -_least(torch.where(is_shown_RS, -step_RS, _NEVER), scope_RS)
    has_wrong_RS = _least(torch.where(is_wrong_RS, 0, _NEVER), scope_RS) == 0
    is_state_RS = ~has_wrong_RS & (last_shown_RS < first_masked_RS)
    if canvas.is_blockwise:
        is_other_RS = (views.context_RS != canvas.input_BS) & canvas.is_real_BS
        is_state_RS &= scope_RS <= _least(torch.where(is_other_RS, scope_RS, _NEVER), torch.zeros_like(scope_RS))
    is_own_RS = views.target_RS == canvas.input_BS
    return views.is_target_RS & is_masked_RS & is_own_RS & is_state_RS & (step_RS == first_masked_RS)


def _least(value_RS: Tensor, scope_RS: Tensor) -> Tensor:
    """The least value within each scope of a row, at all of its positions. Scopes are numbers >= -1."""
    index_RS = scope_RS + 1
    least_RN = value_RS.new_full((len(value_RS), int(index_RS.max()) + 1), _NEVER)
    return least_RN.scatter_reduce(1, index_RS, value_RS, "amin").gather(1, index_RS)
