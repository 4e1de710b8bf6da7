"""The LLaDA2.x transformer under its official parameter names, `model.*` and `lm_head`."""

from __future__ import annotations

from torch import Tensor, nn

from dare.families.config import DenseShape, MoEShape
from dare.families.decoder import StackedNetwork
from dare.families.layers.attention import AttentionCall, rotary_attention
from dare.families.layers.mlp import SwiGLU
from dare.families.layers.moe import Experts, GroupedSigmoidRouter
from dare.families.layers.norm import RMSNorm
from dare.families.llada2.config import Grouping


class LLaDA2Network(StackedNetwork):
    """Fused query/key/value, norms per head, half of each head rotates; the first layers are dense, the others MoE."""

    def __init__(self, shape: DenseShape, moe: MoEShape, grouping: Grouping) -> None:
        super().__init__(shape, _Model(shape, moe, grouping))

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.model.word_embeddings
        return found

    def is_residual_output(self, name: str) -> bool:
        return name.endswith((".attention.dense.weight", ".down_proj.weight", ".experts.down_proj"))


class _Model(nn.Module):
    def __init__(self, shape: DenseShape, moe: MoEShape, grouping: Grouping) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape, _mlp(shape, moe, grouping, is_moe)) for is_moe in moe.is_moe)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)


class _Layer(nn.Module):
    def __init__(self, shape: DenseShape, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.attention = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = mlp

    def forward(self, x_BTD: Tensor, index: int, call: AttentionCall) -> Tensor:
        x_BTD = call.outputs(x_BTD) + self.attention(self.input_layernorm(x_BTD), index, call)
        result: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return result


class _Attention(nn.Module):
    """The rows of `query_key_value` are those of all query heads, then all key heads, then all value heads."""

    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.query_key_value = nn.Linear(shape.hidden_size, sum(self.heads) * shape.head_dim, bias=False)
        self.query_layernorm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.key_layernorm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.dense = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, index: int, call: AttentionCall) -> Tensor:
        query, key, value = self.query_key_value(x_BTD).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        query = call.queries(query)
        mixed = rotary_attention(self.query_layernorm(query), self.key_layernorm(key), value, index, call)
        result: Tensor = self.dense(mixed)
        return result


def _mlp(shape: DenseShape, moe: MoEShape, grouping: Grouping, is_moe: bool) -> nn.Module:
    return _MoE(shape.hidden_size, moe, grouping) if is_moe else SwiGLU(shape.hidden_size, shape.mlp_size)


class _MoE(nn.Module):
    def __init__(self, hidden_size: int, moe: MoEShape, grouping: Grouping) -> None:
        super().__init__()
        self.gate = GroupedSigmoidRouter(
            moe.num_experts,
            hidden_size,
            moe.experts_per_token,
            num_groups=grouping.num_groups,
            groups_per_token=grouping.groups_per_token,
            scale=grouping.scale,
        )
        self.experts = Experts(moe.num_experts, hidden_size, moe.expert_size)
        self.shared_experts = SwiGLU(hidden_size, moe.shared_size) if moe.shared_size else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_ND: Tensor = self.experts(x_ND, self.gate(x_ND))
        routed = y_ND.view_as(x_BTD)
        return routed if self.shared_experts is None else routed + self.shared_experts(x_BTD)
