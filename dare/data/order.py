"""Which row comes when: every place of an endless sequence has its row, a pure function of the key and the data.

Step s of a run takes places s * batch_size to (s + 1) * batch_size - 1 (0-based), so that a run resumes from its step
alone and batches only cut the sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from typing import Generic, Protocol, TypeVar

from dare.core.errors import DareError
from dare.core.lazy import torch
from dare.core.rng import Key

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_CHUNK = 4096  # places of a mixture that are counted at once


class Stream(Protocol[T_co]):
    """An endless sequence of rows."""

    def at(self, place: int) -> T_co:
        """The row of a place (0-based); any place may be asked for, later ones in order are cheapest."""
        ...


def batch_at(stream: Stream[T], batch_size: int, step: int) -> list[T]:
    """The rows of a step (0-based)."""
    return [stream.at(place) for place in range(step * batch_size, (step + 1) * batch_size)]


def row_indices(num_rows: int, batch_size: int, step: int, key: Key) -> list[int]:
    """The rows of a step (0-based): steps cut an endless sequence of epochs, each a keyed permutation of all rows."""
    return batch_at(Shuffled(range(num_rows), key), batch_size, step)


class Shuffled(Generic[T]):
    """Rows in memory, epoch after epoch, each a keyed permutation of all of them."""

    def __init__(self, rows: Sequence[T], key: Key) -> None:
        self._rows = rows
        self._key = key

    def at(self, place: int) -> T:
        num = len(self._rows)
        return self._rows[_epoch_order(num, self._key.fold("epoch", place // num))[place % num]]


@lru_cache(maxsize=8)
def _epoch_order(num_rows: int, key: Key) -> list[int]:
    return key.permutation(num_rows)


class Windowed(Generic[T]):
    """Rows that are read while they are used, epoch after epoch: file order, shuffled within windows.

    Only one window is in memory. A place that is not in the current window or after it is found by reading again from
    the first row, as a resume does.
    """

    def __init__(self, open_rows: Callable[[], Iterator[T]], window: int, key: Key) -> None:
        """`open_rows` begins an epoch; it gives the same rows every time."""
        self._open = open_rows
        self._size = window
        self._key = key
        self._restart()

    def at(self, place: int) -> T:
        if place < self._start:
            self._restart()
        while place >= self._start + len(self._window):
            self._advance()
        order = _epoch_order(len(self._window), self._key.fold("window", self._start))
        return self._window[order[place - self._start]]

    def _restart(self) -> None:
        self._rows = self._open()
        self._start = 0
        self._window: list[T] = []

    def _advance(self) -> None:
        """The next window; the last one of an epoch may be shorter."""
        self._start += len(self._window)
        self._window = list(islice(self._rows, self._size))
        if not self._window:
            self._rows = self._open()
            self._window = list(islice(self._rows, self._size))
        if not self._window:
            raise DareError("no row is left to train on", where="data", fix="look at them with dare data check")


class Mixture(Generic[T]):
    """Several streams, each place given to one of them at random in proportion to its weight.

    The n-th place that a stream gets takes its n-th row, so a source goes through its own epochs in its own order,
    whatever it is mixed with.
    """

    def __init__(self, streams: Sequence[Stream[T]], weights: Sequence[float], key: Key) -> None:
        if len(streams) != len(weights) or not streams:
            raise ValueError(f"{len(streams)} streams, but {len(weights)} weights")
        self._streams = streams
        self._key = key
        total = sum(weights)
        self._bounds = [bound / total for bound in accumulate(weights)][:-1]
        self._before = [[0] * len(streams)]  # by chunk: how many places of each stream come before it
        self._last: tuple[int, list[tuple[int, int]]] = (-1, [])

    def at(self, place: int) -> T:
        source, index = self.source_at(place)
        return self._streams[source].at(index)

    def source_at(self, place: int) -> tuple[int, int]:
        """(which stream, which of its places)."""
        chunk, offset = divmod(place, _CHUNK)
        if self._last[0] != chunk:
            while len(self._before) <= chunk:
                self._before.append(self._dealt(len(self._before) - 1)[1])
            self._last = (chunk, self._dealt(chunk)[0])
        return self._last[1][offset]

    def _dealt(self, chunk: int) -> tuple[list[tuple[int, int]], list[int]]:
        """`source_at` of each place of a chunk, and how many places each stream has had after it."""
        counts = list(self._before[chunk])
        dealt = []
        for number in self._key.uniform(torch.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK)).tolist():
            source = bisect_right(self._bounds, number)
            dealt.append((source, counts[source]))
            counts[source] += 1
        return dealt, counts
