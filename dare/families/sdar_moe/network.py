"""The SDAR-MoE transformer: Qwen3-MoE-shaped, q/k norm per head, softmax routing, no shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from dare.families.config import DenseShape, MoEShape
from dare.families.decoder import DecoderLayer, DecoderNetwork
from dare.families.layers.mlp import SwiGLU
from dare.families.layers.moe import Experts, SoftmaxRouter


class SDARMoENetwork(DecoderNetwork):
    """Under the official parameter names, `model.*` and `lm_head`."""

    def __init__(self, shape: DenseShape, moe: MoEShape, is_normalised: bool) -> None:
        def mlp(is_moe: bool) -> nn.Module:
            width = shape.hidden_size
            return _MoE(width, moe, is_normalised=is_normalised) if is_moe else SwiGLU(width, shape.mlp_size)

        super().__init__(shape, (DecoderLayer(shape, mlp(is_moe)) for is_moe in moe.is_moe))


class _MoE(nn.Module):
    def __init__(self, hidden_size: int, moe: MoEShape, *, is_normalised: bool) -> None:
        super().__init__()
        self.gate = SoftmaxRouter(moe.num_experts, hidden_size, moe.experts_per_token, is_normalised=is_normalised)
        self.experts = Experts(moe.num_experts, hidden_size, moe.expert_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_ND: Tensor = self.experts(x_ND, self.gate(x_ND))
        return y_ND.view_as(x_BTD)
