"""How many of a unit's tokens each of a sample's N views masks: spread evenly over the counts from a random start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def stratified_counts(uniform: Tensor, size: Tensor, num_views: int, lowest: int, view: Tensor) -> Tensor:
    """int64: the mask count of view j, lowest + ((l0 + floor(j C / N)) mod C), with C = size + 1 - lowest values.

    l0 = floor(uniform * C) is common to the N views. Offsets are integers, so every view's own law is exactly uniform
    on {lowest..size}. Rounding evenly spaced reals half to even, as LLaDA's evaluation, ESPO and VRPO do, skips counts
    wherever an offset ends in .5.
    """
    num_counts = size + 1 - lowest
    first = (uniform * num_counts).floor().long()
    return lowest + (first + view * num_counts // num_views) % num_counts


def rounded_counts(uniform: Tensor, size: Tensor, num_views: int, lowest: int, view: Tensor) -> Tensor:
    """int64: lowest + ((round(l0 + j C / N) - lowest) mod C), N evenly spaced float32 numbers rounded half to even.

    The law of LLaDA's evaluation, ESPO, VRPO and BGPO in their public code. A view whose offset ends in .5 visits only
    about half of the counts, so its estimate of the ELBO is biased. Float32 decides where an offset is not exact:
    numbers of the first half are counted from the start, the others from the end, as `torch.linspace` does.
    """
    num_counts = size + 1 - lowest
    start = (lowest + (uniform * num_counts).floor()).float()
    end = (start.double() + (num_views - 1) * num_counts / num_views).float()
    step = (end - start) / max(num_views - 1, 1)
    point = torch.where(view < num_views // 2, start + step * view, end - step * (num_views - 1 - view))
    return lowest + (point.round().long() - lowest) % num_counts
