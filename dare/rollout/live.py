"""The rows that are denoised at the moment, as forwards and the loop see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from dare.rollout.batch import Batch
from dare.rollout.seats import Change, Seats


class Live:
    """Seats on the host and the same rows as a tensor on the device.

    row_H  int64 the row of the batch in each seat
    width  columns that the widest of these rows takes
    """

    def __init__(self, batch: Batch, order: Sequence[int], twins: Sequence[int], capacity: int) -> None:
        """At most `capacity` rows at a time.

        order  the rows to denoise, as they are admitted
        twins  for every row of the batch; equal numbers for rows that begin with equal canvases: what these have in
               common is computed once
        """
        self.batch = batch
        self.twins = list(twins)
        self.row_H = torch.zeros(0, dtype=torch.int64, device=batch.start_B.device)
        self.width = 0
        self.first = batch.start_B.tolist()  # where each row's first block begins
        self._end = batch.end_B.tolist()
        self.capacity = min(capacity, len(self.twins))
        self._seats = Seats(order, self.capacity)
        self._num_waiting = Counter(twins[row] for row in order)

    @property
    def rows(self) -> list[int]:
        return self._seats.rows

    def join(self, row: int, twin: int) -> None:
        """Queue a row of the batch that holds another prompt than before, or the first one."""
        self._num_waiting = +self._num_waiting  # forget twins of rows that are long gone
        self._num_waiting[twin] += 1
        self.twins[row] = twin
        self.first[row], self._end[row] = int(self.batch.start_B[row]), int(self.batch.end_B[row])
        self._seats.join(row)

    def update(self) -> Change:
        """Rows that are done or pause leave, others take their place."""
        is_live = self.batch.is_active(self.row_H).tolist()
        if self.rows and all(is_live) and not self._seats.has_room:
            return Change([], [], [])
        change = self._seats.update(is_live)
        self.row_H = torch.tensor(self.rows, dtype=torch.int64, device=self.row_H.device)
        self.width = max((self._end[row] for row in self.rows), default=0)
        self._num_waiting.subtract(self.twins[self.rows[seat]] for seat in change.admitted)
        return change

    def has_padding(self, rows: Sequence[int]) -> bool:
        """Whether some of these rows are narrower than the widest."""
        return any(self._end[row] < self.width for row in rows)

    def num_waiting(self, twin: int) -> int:
        """Rows with this canvas that have not been admitted."""
        return self._num_waiting[twin]
