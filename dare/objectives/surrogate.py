"""The clipped policy-gradient surrogate (PPO, Schulman et al. 2017, equation 7), evaluated in the log domain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ClipPreset = Literal["clip_higher", "gspo"]

# How far a ratio may fall below 1 and rise above it.
CLIP_PRESETS: dict[str, tuple[float, float]] = {
    "clip_higher": (0.2, 0.28),  # DAPO (Yu et al. 2025): room for rare tokens to rise
    "gspo": (3e-4, 4e-4),  # GSPO (Zheng et al. 2025): ratios of whole sequences, per token
}


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The objective to maximise for each item, and whether its clip binds (bool); both of the broadcast shape.

    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) with r = exp(log_ratio) is exp(log_ratio capped on one side) A: from
    above where A >= 0, from below where A < 0. So an item that is clipped never computes its ratio, and cannot
    overflow. An item exactly on the bound keeps its gradient, which is what makes eps = 0 train on policy.

    dual_clip  > 1: where A < 0 the ratio is capped at this value too, so that the objective is at least dual_clip * A
               (Ye et al. 2020)
    """
    is_up = advantage >= 0
    cap = math.inf if dual_clip is None else math.log(dual_clip)
    high = torch.where(is_up, torch.full_like(log_ratio, math.log1p(eps_high)), cap)
    low = torch.where(is_up, torch.full_like(log_ratio, -math.inf), math.log1p(-eps_low))
    is_clipped = (log_ratio > high) | (log_ratio < low)
    bound = torch.where(log_ratio > high, high, low)
    return torch.where(is_clipped, bound, log_ratio).exp() * advantage, is_clipped


def linear_surrogate(
    log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate with 1 + log_ratio in place of the ratio where A >= 0 (BGPO, Lin et al. 2025).

    Averaged over the draws of a sample it bounds the surrogate of their mean from below, with equal value and gradient
    where the log-ratios are 0, because 1 + d <= exp(d) and exp is convex. Finite for every log-ratio.
    """
    is_up = advantage >= 0
    down, is_down_clipped = clipped_surrogate(log_ratio, advantage.clamp(max=0.0), eps_low, eps_high, dual_clip)
    is_up_clipped = log_ratio > eps_high
    up = (1 + torch.where(is_up_clipped, eps_high, log_ratio)) * advantage
    return torch.where(is_up, up, down), torch.where(is_up, is_up_clipped, is_down_clipped)
