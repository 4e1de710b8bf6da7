"""The only place that divides. Denominators belong to the whole batch of one optimizer step, never to a micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.core.types import Metric

if TYPE_CHECKING:
    from torch import Tensor


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count elementwise, 0 where the count is 0 (also in the gradient)."""
    is_empty = count == 0
    return torch.where(is_empty, 0.0, total) / torch.where(is_empty, 1, count)


def masked_mean(value: Tensor, is_counted: Tensor) -> Tensor:
    """0-d: the mean of `value` over `is_counted` (bool, same shape); 0 if nothing is counted."""
    return divide(torch.where(is_counted, value, 0.0).sum(), is_counted.sum())


def mean(value: Tensor) -> Tensor:
    """0-d: the mean of all elements; 0 if there are none."""
    return divide(value.sum(), torch.tensor(value.numel(), device=value.device))


def mean_of_means(value: Tensor, is_counted: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """0-d: the mean, over the groups that count anything, of each group's mean.

    `group` (int64 in [0, num_groups)) broadcasts to `value`.
    """
    flat_group = group.expand_as(value)[is_counted]
    counted = value[is_counted]
    total_G = torch.zeros(num_groups, dtype=value.dtype, device=value.device).index_add(0, flat_group, counted)
    count_G = torch.zeros_like(total_G).index_add(0, flat_group, torch.ones_like(counted))
    return masked_mean(divide(total_G, count_G), count_G > 0)


def group_mean(value: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[num_groups]: the mean of the elements of each group; 0 for an empty one. `group` is int64, one per element."""
    zero = torch.zeros(num_groups, dtype=value.dtype, device=value.device)
    count = zero.index_add(0, group, torch.ones_like(value).detach())
    return divide(zero.index_add(0, group, value), count)


def metric(value: Tensor, is_counted: Tensor | None = None) -> Metric:
    """The mean of `value` over `is_counted` (default: everywhere) with its denominator, detached."""
    value = value.detach().double()
    if is_counted is None:
        return Metric(float(value.sum()), float(value.numel()))
    return Metric(float(torch.where(is_counted, value, 0.0).sum()), float(is_counted.sum()))
