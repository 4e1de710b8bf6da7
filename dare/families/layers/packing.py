"""Weights in oneDNN's own layout while a rollout runs: the CPU multiplies a few rows by them up to three times faster.

Packing takes about as long as two forwards of a few rows. The next rollout uses the copies again where the weights
still hold the same bits, which it finds out by itself, in a twentieth of that time: nobody has to announce an update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

Multiply = Callable[[Tensor], Tensor]  # [..., in] -> [..., out]

_DTYPES = (torch.float32, torch.bfloat16)
_MIN_ELEMENTS = 1 << 16  # smaller matrices stay in the cache anyway
_ROWS_HINT = 256  # the layout serves calls with any number of rows about equally well from 32 on
_PROBE_SIZE, _PROBE_ROWS, _NUM_PROBES = 512, 8, 5


def pack(weight: Tensor, bias: Tensor | None = None) -> Multiply | None:
    """A faster `functional.linear` with these weights as they are now, equal up to rounding; None if there is none.

    The result has no gradient.
    """
    return PackedWeights().multiplier(weight, bias)


class PackedWeights:
    """Packed copies of the matrices of one network, each with the bits it was made of."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, tuple[Tensor, Tensor]] = {}  # by weight: what it was then, and its copy

    def __getstate__(self) -> dict[str, object]:
        """A copy of a network packs for itself."""
        return {"_kept": {}}

    def drop(self) -> None:
        """Give the memory back."""
        self._kept = {}

    def multiplier(self, weight: Tensor, bias: Tensor | None = None) -> Multiply | None:
        """See `pack`."""
        is_plain = type(weight) in (Tensor, nn.Parameter)  # no shard of a distributed tensor, no quantised one
        if not (
            is_plain and weight.device.type == "cpu" and weight.numel() >= _MIN_ELEMENTS and is_faster(weight.dtype)
        ):
            return None
        packed = self._packed(weight)
        fixed_bias = None if bias is None else bias.detach()

        def multiply(x: Tensor) -> Tensor:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, fixed_bias, "none", [], "")
            return result

        return multiply

    def _packed(self, weight: Tensor) -> Tensor:
        bits, kept = _bits(weight), self._kept.get(weight)
        if bits is not None and kept is not None and torch.equal(kept[0], bits):
            return kept[1]
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
        if bits is not None:
            self._kept[weight] = (bits, packed)
        return packed

    @contextmanager
    def linears(self, network: nn.Module, head_weight: Tensor) -> Iterator[Multiply | None]:
        """Linear layers multiply with packed weights while the block runs, in which no weight may change.

        Yields the multiplication by `head_weight`, which may be a linear layer's or the embedding's.
        """
        changed, weights = [], {*network.parameters(), head_weight}
        self._kept = {weight: kept for weight, kept in self._kept.items() if weight in weights}
        try:
            for module in network.modules():
                if type(module) is not nn.Linear or module.weight is head_weight:
                    continue
                multiply = self.multiplier(module.weight, module.bias)
                if multiply is not None:
                    module.forward = multiply  # type: ignore[assignment, method-assign]
                    changed.append(module)
            yield self.multiplier(head_weight)
        finally:
            for module in changed:
                vars(module).pop("forward", None)  # gone already if another thread's rollout ended first


def _bits(weight: Tensor) -> Tensor | None:
    """int64: sums of each row's bits, eight bytes at a time; None where rows are no such units.

    No change of a single number goes unseen, and one of many would have to conspire in every row.
    """
    row_bytes, offset = weight.shape[-1] * weight.element_size(), weight.storage_offset() * weight.element_size()
    if row_bytes % 8 or offset % 8 or not weight.is_contiguous():
        return None
    bits: Tensor = weight.detach().view(torch.int64).sum(-1)
    return bits


@cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed matmul for `dtype`, and this machine runs it faster than the plain one."""
    has_operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    if dtype not in _DTYPES or not torch._C._has_mkldnn or not has_operators:
        return False
    weight, x = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype), torch.ones(_PROBE_ROWS, _PROBE_SIZE, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        fast = _seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    except RuntimeError:  # built without support for this CPU or dtype
        return False
    return fast < _seconds(lambda: functional.linear(x, weight))


def _seconds(run: Callable[[], Tensor]) -> float:
    """CPU time of the fastest of a few calls, the first aside."""
    run()
    best = float("inf")
    for _ in range(_NUM_PROBES):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best
