"""Whether the trainer and the rollout agree: log-probs of the same token on the same canvas, computed by both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.types import Samples, Views


def rollout_gap(logp_RS: Tensor, views: Views, samples: Samples) -> float | None:
    """The mean |trainer log-prob - rollout log-prob| in nats, over views that repeat a step of the rollout.

    Such a view masks exactly what was masked before some step and scores tokens that this step committed. None where
    the algorithm scores no such view, or at another temperature. Zero but for rounding while the rollout's weights are
    the trainer's; a stale cache, an old policy or another kernel show here.
    """
    if samples.step_map_BS is None or samples.rollout_logp_BS is None:
        return None
    if views.temperature != samples.rollout_temperature:
        return None
    step_map_RS = samples.step_map_BS[views.sample_R]
    never = torch.iinfo(torch.int64).max
    step_R1 = torch.where(views.is_target_RS, step_map_RS, never).amin(-1, keepdim=True)
    ids_RS = samples.canvas.input_BS[views.sample_R]
    seen_RS = torch.where(step_map_RS >= step_R1, samples.mask_id, ids_RS)
    is_seen_R1 = (seen_RS == views.noisy_RS).all(-1, keepdim=True) & (step_R1 >= 0)
    is_same_RS = views.is_target_RS & is_seen_R1 & (step_map_RS == step_R1) & (views.target_RS == ids_RS)
    if not bool(is_same_RS.any()):
        return None
    gap_RS = (logp_RS - samples.rollout_logp_BS[views.sample_R]).abs()
    return float(gap_RS[is_same_RS].double().mean())
