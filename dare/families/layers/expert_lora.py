"""Low-rank adapters of stacked experts: every expert has its own pair, as if its matrices were linear layers.

Shapes: N tokens, E experts, D width, F expert width, R rank; a stacked matrix is [E, O, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dare.families.layers.moe import Experts, Route, by_expert, can_group, looped, sorted_linear


class AdaptedExperts(nn.Module):
    """Experts whose matrices `names` are `W_e + scale * B_e A_e`; off, they are the base layer itself.

    The pairs are stacked like the base, so the same grouped matmuls run them: lora_A [E, R, I], lora_B [E, O, R].
    Their values are whatever memory held; the caller fills them.
    """

    def __init__(self, base_layer: Experts, names: Iterable[str], rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = scale
        self.is_on = True
        weights = {name: base_layer.get_parameter(name) for name in sorted(names)}
        self.lora_A = nn.ParameterDict(
            {name: torch.empty(len(w), rank, w.shape[2], dtype=w.dtype, device=w.device) for name, w in weights.items()}
        )
        self.lora_B = nn.ParameterDict(
            {name: torch.empty(len(w), w.shape[1], rank, dtype=w.dtype, device=w.device) for name, w in weights.items()}
        )

    def enable_adapters(self, enabled: bool) -> None:
        """On or off; the name and meaning are those of peft's layers."""
        self.is_on = enabled

    def forward(self, x_ND: Tensor, route: Route) -> Tensor:
        return by_expert(self._run_sorted, x_ND, route) if self.is_on else self.base_layer(x_ND, route)

    def _run_sorted(self, sorted_x: Tensor, end_E: Tensor) -> Tensor:
        """As the base layer does it, grouped or expert by expert, so that a B of zeros changes no bit."""
        if can_group(sorted_x, self.base_layer.gate_proj):
            return _swiglu(lambda name, x: self._grouped_linear(name, x, end_E), sorted_x)
        unbound = {name: stacked.unbind(0) for name, stacked in self.base_layer.named_parameters()}
        a_pairs = {name: stacked.unbind(0) for name, stacked in self.lora_A.items()}
        b_pairs = {name: stacked.unbind(0) for name, stacked in self.lora_B.items()}

        def linear(name: str, expert: int, x: Tensor) -> Tensor:
            y = functional.linear(x, unbound[name][expert])
            if name not in a_pairs:
                return y
            low = functional.linear(x, a_pairs[name][expert])
            return y + self.scale * functional.linear(low, b_pairs[name][expert])

        return looped(lambda expert, x: _swiglu(lambda name, x: linear(name, expert, x), x), sorted_x, end_E)

    def _grouped_linear(self, name: str, x: Tensor, end_E: Tensor) -> Tensor:
        y = sorted_linear(x, end_E, self.base_layer.get_parameter(name))
        if name not in self.lora_A:
            return y
        return y + self.scale * sorted_linear(sorted_linear(x, end_E, self.lora_A[name]), end_E, self.lora_B[name])


def _swiglu(linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    hidden = functional.silu(linear("gate_proj", x)) * linear("up_proj", x)
    return linear("down_proj", hidden)
