"""The LLaDA-MoE transformer: OLMoE-shaped, q/k norm per head, softmax routing that is not normalised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dare.families.config import DenseShape, MoEShape
from dare.families.decoder import DecoderLayer, DecoderNetwork
from dare.families.layers.mlp import SwiGLU
from dare.families.layers.moe import Experts, SoftmaxRouter


class LLaDAMoENetwork(DecoderNetwork):
    """Under the official parameter names, `model.*` and `lm_head`."""

    def __init__(self, shape: DenseShape, moe: MoEShape, has_expert_bias: bool) -> None:
        def layer(is_moe: bool) -> DecoderLayer:
            if is_moe:
                return _MoELayer(shape, moe, has_expert_bias=has_expert_bias)
            return DecoderLayer(shape, SwiGLU(shape.hidden_size, shape.mlp_size))

        super().__init__(shape, (layer(is_moe) for is_moe in moe.is_moe))


class _MoELayer(DecoderLayer):
    """The shared expert, if there is one, stands beside `mlp`, not in it."""

    def __init__(self, shape: DenseShape, moe: MoEShape, *, has_expert_bias: bool) -> None:
        super().__init__(shape, _MoE(shape.hidden_size, moe, has_expert_bias=has_expert_bias))
        self.shared_expert = SwiGLU(shape.hidden_size, moe.shared_size) if moe.shared_size else None

    def feed_forward(self, normed_BTD: Tensor) -> Tensor:
        routed = super().feed_forward(normed_BTD)
        return routed if self.shared_expert is None else routed + self.shared_expert(normed_BTD)


class _MoE(nn.Module):
    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoEShape, *, has_expert_bias: bool) -> None:
        super().__init__()
        self.gate = SoftmaxRouter(moe.num_experts, hidden_size, moe.experts_per_token, is_normalised=False)
        self.experts = Experts(moe.num_experts, hidden_size, moe.expert_size)
        bias = torch.zeros(moe.num_experts, dtype=torch.float32) if has_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_ND: Tensor = self.experts(x_ND, self.gate(x_ND, self.expert_bias))
        return y_ND.view_as(x_BTD)
