"""Advantages: rewards compared within the group of completions of one prompt.

    mean   R - mean                       d1, CJ-GRPO
    loo    R - mean of the others         Coupled-GRPO, ESPO
    std4   (R - mean) / (s + 1e-4)        s: standard deviation with n - 1 (GRPO in TRL)
    std6   (R - mean) / (s + 1e-6)        the same with verl's constant
    zpop   (R - mean) / sigma             sigma: standard deviation with n (TraceRL)

A group of one, or with equal rewards, has nothing to compare: its advantages are exactly 0 under every rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dare.core.errors import unknown_name
from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

AdvantageRule = Literal["mean", "loo", "std4", "std6", "zpop"]


@dataclass(frozen=True)
class Centred:
    """Rewards as a rule sees them, all float64 [B]; statistics are those of the sample's own group."""

    deviation_B: Tensor  # R - mean
    squares_B: Tensor  # sum of squared deviations
    size_B: Tensor  # members, at least 2 wherever the result is used


RULES: dict[str, Callable[[Centred], Tensor]] = {
    "mean": lambda group: group.deviation_B,
    "loo": lambda group: group.deviation_B * group.size_B / (group.size_B - 1),
    "std4": lambda group: group.deviation_B / ((group.squares_B / (group.size_B - 1)).sqrt() + 1e-4),
    "std6": lambda group: group.deviation_B / ((group.squares_B / (group.size_B - 1)).sqrt() + 1e-6),
    "zpop": lambda group: group.deviation_B / (group.squares_B / group.size_B).sqrt(),
}


def compute_advantages(rule: str, reward_B: Tensor, group_B: Tensor) -> Tensor:
    """float32 [B]: the advantage of each sample under `rule`; `group_B` (int64 [B]) need not be sorted.

    Raises DareError for an unknown rule.
    """
    if rule not in RULES:
        raise unknown_name("advantage rule", rule, RULES)
    reward_B = reward_B.double()
    _, index_B = torch.unique(group_B, return_inverse=True)
    zero_G = torch.zeros(int(index_B.max()) + 1, dtype=reward_B.dtype, device=reward_B.device)
    size_B = zero_G.index_add(0, index_B, torch.ones_like(reward_B))[index_B]
    deviation_B = reward_B - zero_G.index_add(0, index_B, reward_B)[index_B] / size_B
    squares_B = zero_G.index_add(0, index_B, deviation_B.square())[index_B]
    # Equal rewards are found by comparison: a mean of equal numbers may be off by one rounding.
    lowest_B = zero_G.scatter_reduce(0, index_B, reward_B, "amin", include_self=False)[index_B]
    highest_B = zero_G.scatter_reduce(0, index_B, reward_B, "amax", include_self=False)[index_B]
    advantage_B = RULES[rule](Centred(deviation_B, squares_B, size_B))
    return torch.where(lowest_B == highest_B, 0.0, advantage_B).float()


def group_softmax(value_B: Tensor, group_B: Tensor) -> Tensor:
    """float64 [B]: the softmax of `value_B` within each group; the weights of a group sum to 1."""
    value_B = value_B.double()
    _, index_B = torch.unique(group_B, return_inverse=True)
    zero_G = torch.zeros(int(index_B.max()) + 1, dtype=value_B.dtype, device=value_B.device)
    highest_B = zero_G.scatter_reduce(0, index_B, value_B, "amax", include_self=False)[index_B]
    weight_B = (value_B - highest_B).exp()
    return weight_B / zero_G.index_add(0, index_B, weight_B)[index_B]
