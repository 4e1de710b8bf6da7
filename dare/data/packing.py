"""Rows of unequal length in forwards of about equal size, and what padding them would have cost. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows that go together: at most `capacity` tokens each, a longer row by itself, longest rows first.

    Rows of alike length meet, because attention still pays for the longest document of a pack; equal ones keep their
    order.
    """
    found: list[list[int]] = []
    free = 0
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not found or lengths[index] > free:
            found.append([])
            free = capacity
        found[-1].append(index)
        free -= lengths[index]
    return found


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padding in the positions of batches of rows (indices), each as wide as its longest row; 0 for none."""
    num_real = num_all = 0
    for batch in batches:
        num_real += sum(lengths[index] for index in batch)
        num_all += len(batch) * max((lengths[index] for index in batch), default=0)
    return 1.0 - num_real / num_all if num_all else 0.0
