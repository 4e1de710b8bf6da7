"""The gated feed-forward layer (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def swiglu(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """`down(silu(gate(x)) * up(x))`. The layers stay with the caller, whose checkpoint names them."""
    hidden: Tensor = functional.silu(gate(x)) * up(x)
    result: Tensor = down(hidden)
    return result
