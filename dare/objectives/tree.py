"""Values and advantages on trees whose leaves are rewarded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.objectives.advantage import compute_advantages
from dare.objectives.reduce import divide

if TYPE_CHECKING:
    from torch import Tensor


def node_values(leaf_reward_N: Tensor, parent_N: Tensor, is_leaf_N: Tensor) -> Tensor:
    """float64 [N]: a leaf's reward, an inner node's mean over its children.

    parent_N  int64 index of each node's parent, -1 for a root; parents come before children
    """
    value_N = torch.where(is_leaf_N, leaf_reward_N.double(), 0.0)
    depth_N = _depths(parent_N)
    for depth in range(int(depth_N.max()), 0, -1):
        child_C = (depth_N == depth).nonzero()[:, 0]
        total_N = torch.zeros_like(value_N).index_add(0, parent_N[child_C], value_N[child_C])
        count_N = torch.zeros_like(value_N).index_add(0, parent_N[child_C], torch.ones_like(value_N[child_C]))
        value_N = torch.where(count_N > 0, divide(total_N, count_N), value_N)
    return value_N


def sibling_advantages(rule: str, value_N: Tensor, parent_N: Tensor, *, only_child: str = "zero") -> Tensor:
    """float32 [N]: each node's value compared with its siblings' under an advantage rule; 0 for roots.

    only_child  what a node without siblings gets: "zero", or "value", its whole value, as in the public code of
                d-TreeRPO, which subtracts the mean of no siblings
    """
    is_child_N = parent_N >= 0
    advantage_N = torch.zeros(len(value_N))
    advantage_N[is_child_N] = compute_advantages(rule, value_N[is_child_N], parent_N[is_child_N])
    if only_child == "zero":
        return advantage_N
    num_children_N = torch.zeros_like(parent_N).index_add(
        0, parent_N[is_child_N], torch.ones_like(parent_N[is_child_N])
    )
    is_only_N = is_child_N & (num_children_N[parent_N.clamp(min=0)] == 1)
    return torch.where(is_only_N, value_N.float(), advantage_N)


def _depths(parent_N: Tensor) -> Tensor:
    depths: list[int] = []
    for parent in parent_N.tolist():
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return torch.tensor(depths)
