"""The gated feed-forward layer (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def swiglu(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """`down(silu(gate(x)) * up(x))`. The layers stay with the caller, whose checkpoint names them."""
    hidden: Tensor = functional.silu(gate(x)) * up(x)
    result: Tensor = down(hidden)
    return result


class SwiGLU(nn.Module):
    """The same with the parameter names that most checkpoints use; no biases."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj, self.up_proj, self.down_proj)
