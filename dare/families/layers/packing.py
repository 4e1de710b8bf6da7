"""Weights in oneDNN's own layout while a rollout runs: the CPU multiplies a few rows by them up to three times faster.

Packed copies live for one rollout. There is nothing to keep in step with the trained weights: the next rollout packs
what they are then, which takes about as long as two forwards of a few rows.
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
    is_plain = type(weight) in (Tensor, nn.Parameter)  # no shard of a distributed tensor, no quantised one
    if not (is_plain and weight.device.type == "cpu" and weight.numel() >= _MIN_ELEMENTS and is_faster(weight.dtype)):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    fixed_bias = None if bias is None else bias.detach()

    def multiply(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, fixed_bias, "none", [], "")
        return result

    return multiply


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


@contextmanager
def packed_linears(network: nn.Module) -> Iterator[None]:
    """Linear layers multiply with packed weights while the block runs, in which no weight may change."""
    changed = []
    try:
        for module in network.modules():
            multiply = pack(module.weight, module.bias) if type(module) is nn.Linear else None
            if multiply is not None:
                module.forward = multiply  # type: ignore[method-assign]
                changed.append(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)  # gone already if another thread's rollout ended first
