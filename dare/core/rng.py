"""Counter-based randomness: a number is a pure function of a key, never of what was drawn before.

A `Key` is a node in a tree of streams: `Key(seed).fold("rollout", step)`. Two draws with the same key and
counters are equal on every machine, in any batch, order, world size or after a resume; the global
generators of Python, NumPy and torch are never read or written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on a Python integer."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` on int64 tensors; multiplication wraps modulo 2**64."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX2)
    return x ^ _shift_right(x, 31)


def _bits(state: Tensor, *counters: Tensor) -> Tensor:
    for counter in counters:
        state = _mix_tensor(state + _signed(_GOLDEN) + _mix_tensor(counter.long() + 1))
    return _mix_tensor(state)


def _unit(bits: Tensor) -> Tensor:
    return _shift_right(bits, 11).double() * 2.0**-53


def stable_id(*parts: object) -> int:
    """A non-negative 63-bit integer from the text of `parts`, equal in every process and version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws(Protocol):
    """What hands out random numbers: a `Key`, or a `KeyTable` where rows have keys of their own."""

    def fold(self, *parts: int | str) -> Draws:
        """The child stream named by `parts`."""

    def uniform(self, *counters: Tensor) -> Tensor:
        """Uniform float64 numbers in [0, 1), one for each tuple of int64 `counters`."""


@dataclass(frozen=True, slots=True)
class Key:
    """A stream of random numbers named by a path of integers and strings."""

    state: int

    def fold(self, *parts: int | str) -> Key:
        """The child stream named by `parts`."""
        state = self.state & _MASK64
        for part in parts:
            number = stable_id(part) if isinstance(part, str) else part
            state = _mix(state + _GOLDEN + _mix(number + 1))
        return Key(state)

    def uniform(self, *counters: Tensor) -> Tensor:
        """Uniform float64 numbers in [0, 1), one for each broadcast tuple of int64 `counters`."""
        return _unit(self.bits(*counters))

    def bits(self, *counters: Tensor) -> Tensor:
        """64 random bits (as int64) for each broadcast tuple of int64 `counters`."""
        return _bits(torch.tensor(self.start, device=counters[0].device), *counters)

    @property
    def start(self) -> int:
        """What the mixing of counters begins with, as a signed 64-bit integer."""
        return _signed(_mix(self.state))

    def integers(self, low: int, high: Tensor | int, *counters: Tensor) -> Tensor:
        """Uniform integers in [low, high), int64."""
        return low + (self.uniform(*counters) * (high - low)).floor().long()

    def permutation(self, n: int) -> list[int]:
        """A uniform random order of range(n); pure Python, no torch."""
        base = _mix(self.state)
        return sorted(range(n), key=lambda i: _mix(base + _GOLDEN * (i + 1)))

    def python_seed(self) -> int:
        """A 63-bit seed for a library's own generator (problem generators, weight initialisation)."""
        return _mix(self.state) >> 1


class KeyTable:
    """Keys and sample ids of rows that share a batch but belong to different calls.

    The first counter of a draw is a row's place in the table: the row gets the number that its own key gives for
    (its own sample id, further counters). Entries may be replaced at any time.
    """

    def __init__(self, entries: Sequence[tuple[Key, int]]) -> None:
        """One (key, sample id) for each place."""
        self._entries = list(entries)
        self._children: dict[tuple[int | str, ...], KeyTable] = {}
        self._start_B: Tensor | None = None
        self._sample_id_B: Tensor | None = None

    def put(self, place: int, key: Key, sample_id: int) -> None:
        """Replace the entry at `place`."""
        self._entries[place] = (key, sample_id)
        self._children, self._start_B = {}, None

    def fold(self, *parts: int | str) -> KeyTable:
        """The child streams named by `parts`, place by place."""
        if parts not in self._children:
            self._children[parts] = KeyTable([(key.fold(*parts), sample_id) for key, sample_id in self._entries])
        return self._children[parts]

    def uniform(self, *counters: Tensor) -> Tensor:
        """Uniform float64 numbers in [0, 1): counters are the place, then those of `Key.uniform` after the id."""
        place_N, *others = counters
        if self._start_B is None or self._sample_id_B is None:
            self._start_B = torch.tensor([key.start for key, _ in self._entries], device=place_N.device)
            self._sample_id_B = torch.tensor([sample_id for _, sample_id in self._entries], device=place_N.device)
        return _unit(_bits(self._start_B[place_N], self._sample_id_B[place_N], *others))
