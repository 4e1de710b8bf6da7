"""Which rows of a call are denoised now, and which seat each of them has. Lists on the host; no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Change(NamedTuple):
    """How the seats change between two steps: some rows leave, others move up, others sit down.

    left      rows that left
    moved     (to, from) pairs of seats, none of which is both
    admitted  seats that have a new row
    """

    left: list[int]
    moved: list[tuple[int, int]]
    admitted: list[int]


class Seats:
    """At most `capacity` rows at a time, in the order in which they were queued; seats 0 .. n - 1 are taken.

    A seat is a row of the cache. Whoever leaves is replaced from the queue, in place; only when nobody is waiting do
    the last rows move up into the gaps, so that what is read stays contiguous.
    """

    def __init__(self, order: Sequence[int], capacity: int) -> None:
        self.rows: list[int] = []
        self._queue = deque(order)
        self._capacity = capacity

    @property
    def has_room(self) -> bool:
        """Whether somebody waits although not all seats are taken."""
        return bool(self._queue) and len(self.rows) < self._capacity

    def join(self, row: int) -> None:
        """Queue another row."""
        self._queue.append(row)

    def update(self, is_live: Sequence[bool]) -> Change:
        """Let rows go and others in; `is_live` says of each seat whether its row stays."""
        left = [row for row, stays in zip(self.rows, is_live, strict=True) if not stays]
        free = [seat for seat, stays in enumerate(is_live) if not stays]
        num_new = min(len(self._queue), self._capacity - len(self.rows) + len(free))
        self.rows += [-1] * max(0, num_new - len(free))
        admitted = [*free, *range(len(is_live), len(self.rows))][:num_new]
        for seat in admitted:
            self.rows[seat] = self._queue.popleft()
        moved = self._close(free[num_new:])
        return Change(left, moved, admitted)

    def _close(self, gaps: list[int]) -> list[tuple[int, int]]:
        """Fill the gaps, in ascending order, from the end."""
        moved, is_gap = [], set(gaps)
        for gap in gaps:
            while self.rows and len(self.rows) - 1 in is_gap:
                is_gap.remove(len(self.rows) - 1)
                self.rows.pop()
            if gap < len(self.rows):
                moved.append((gap, len(self.rows) - 1))
                self.rows[gap] = self.rows.pop()
                is_gap.remove(gap)
        return moved
