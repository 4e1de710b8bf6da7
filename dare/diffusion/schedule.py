"""Noise schedules: how much is masked at time t, and what a masked token's log-prob weighs in the ELBO.

alpha(t) is the probability that a token is still clean at time t, falling from 1 at t = 0 to 0 at t = 1. The
continuous-time ELBO is the mean over t of w(t) times the log-probs of the masked tokens, w = -alpha' / (1 - alpha)
(Sahoo et al. 2024; Shi et al. 2024). Both functions below work from 1 - alpha directly, because alpha itself is close
to 1 where the weight is largest. BD3-LM's public code floors its schedules at 1e-3 instead of bounding t from below,
so its weights at small t are not slopes of what it masks; ours are, and `t_min` does the bounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from dare.core.errors import unknown_name
from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ScheduleName = Literal["linear", "cosine", "raised_cosine", "square", "square_root", "log"]


class Schedule(NamedTuple):
    """Both functions take and return tensors of times in (0, 1]."""

    mask_probability: Callable[[Tensor], Tensor]  # 1 - alpha(t)
    loss_weight: Callable[[Tensor], Tensor]  # w(t) = -alpha'(t) / (1 - alpha(t))


SCHEDULES: dict[str, Schedule] = {
    # alpha = 1 - t
    "linear": Schedule(lambda t: t, lambda t: 1.0 / t),
    # alpha = 1 - sin(pi t / 2), the cosine schedule of MD4
    "cosine": Schedule(
        lambda t: torch.sin(t * (math.pi / 2)),
        lambda t: (math.pi / 2) / torch.tan(t * (math.pi / 2)),
    ),
    # alpha = cos(pi t / 2), the cosine schedule of BD3-LM: few masks for most of the time
    "raised_cosine": Schedule(
        lambda t: 2.0 * torch.sin(t * (math.pi / 4)).square(),
        lambda t: (math.pi / 2) / torch.tan(t * (math.pi / 4)),
    ),
    "square": Schedule(lambda t: t.square(), lambda t: 2.0 / t),
    "square_root": Schedule(lambda t: t.sqrt(), lambda t: 0.5 / t),
    # alpha = 1 - log2(1 + t)
    "log": Schedule(
        lambda t: torch.log1p(t) / math.log(2.0),
        lambda t: 1.0 / ((1.0 + t) * torch.log1p(t)),
    ),
}


def find_schedule(name: str) -> Schedule:
    """The row `name` of the table. Raises DareError for an unknown name."""
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def spread_time(uniform: Tensor, t_min: float, t_max: float = 1.0) -> Tensor:
    """Times uniform on [t_min, t_max) from numbers uniform on [0, 1).

    With the linear schedule and t_min = 1e-3 the mask probability is LLaDA's (1 - eps) t + eps. The floor bounds the
    weight by about 1 / t_min and biases the ELBO by a relative O(t_min).
    """
    return t_min + (t_max - t_min) * uniform


def stratum(uniform: Tensor, place: Tensor, num: Tensor | int) -> Tensor:
    """A number from the stratum `place` of `num` equal parts of [0, 1), from one uniform on [0, 1).

    Over a uniform random place the law is uniform. BD3-LM's public code uses the index of the block in the batch as its
    place, which ties a block's noise level to where it stands (E[t] is 0.125 for the first of four blocks).
    """
    return (uniform + place) / num
