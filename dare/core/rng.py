"""Counter-based randomness: a number is a pure function of a key, never of what was drawn before.

A `Key` is a node in a tree of streams: `Key(seed).fold("rollout", step)`. Two draws with the same key and
counters are equal on every machine, in any batch, order, world size or after a resume; the global
generators of Python, NumPy and torch are never read or written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def stable_id(*parts: object) -> int:
    """A non-negative 63-bit integer from the text of `parts`, equal in every process and version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


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
        return _shift_right(self.bits(*counters), 11).double() * 2.0**-53

    def bits(self, *counters: Tensor) -> Tensor:
        """64 random bits (as int64) for each broadcast tuple of int64 `counters`."""
        state = torch.tensor(_signed(_mix(self.state)), device=counters[0].device)
        for counter in counters:
            state = _mix_tensor(state + _signed(_GOLDEN) + _mix_tensor(counter.long() + 1))
        return _mix_tensor(state)

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
