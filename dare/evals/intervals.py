"""Confidence intervals for solve rates."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054


def wilson(num_solved: int, num: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if num == 0:
        return 0.0, 1.0
    rate = num_solved / num
    centre = rate + _Z95**2 / (2 * num)
    spread = _Z95 * math.sqrt(rate * (1 - rate) / num + _Z95**2 / (4 * num**2))
    scale = 1 + _Z95**2 / num
    low = 0.0 if num_solved == 0 else (centre - spread) / scale
    high = 1.0 if num_solved == num else (centre + spread) / scale
    return low, high
