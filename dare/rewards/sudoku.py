"""Sudoku grids as text, row by row, one ASCII digit per cell."""

from __future__ import annotations

import math


def is_grid(text: str, side: int) -> bool:
    """Whether `text` is exactly side x side digits from 1 to `side` (at most 9)."""
    digits = "123456789"[:side]
    return len(text) == side * side and all(character in digits for character in text)


def is_solved_grid(text: str, side: int) -> bool:
    """Whether every row, column and box of a grid holds each digit once."""
    box = math.isqrt(side)
    if not is_grid(text, side):
        return False
    seen = set()
    for cell, digit in enumerate(text):
        row, column = divmod(cell, side)
        seen |= {("row", row, digit), ("column", column, digit), ("box", (row // box, column // box), digit)}
    # Each of the 3 x side groups holds `side` cells, so it holds every digit iff no pair of group and digit repeats.
    return len(seen) == 3 * side * side
