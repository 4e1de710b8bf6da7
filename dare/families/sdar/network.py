"""The SDAR transformer under its official parameter names, `model.*` and `lm_head`."""

from __future__ import annotations

from torch import Tensor, nn

from dare.families.base import Network
from dare.families.config import DenseShape
from dare.families.layers.attention import AttentionCall, KVCache, Visible, rotary_attention
from dare.families.layers.mlp import swiglu
from dare.families.layers.norm import RMSNorm
from dare.families.layers.rope import rotation


class SDARNetwork(Network):
    """A Qwen3-shaped transformer: queries and keys are normalised per head before the rotation; no biases."""

    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.num_layers = shape.num_layers
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.logit_scale = shape.logit_scale
        self.rope_theta = shape.rope_theta
        self.model = _Model(shape)
        self.lm_head = None if shape.is_tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def forward(self, ids_BT: Tensor, position_BT: Tensor, visible: Visible, cache: KVCache | None = None) -> Tensor:
        turn = rotation(position_BT, self.head_dim, self.rope_theta)
        call = AttentionCall(position_BT, turn, visible, cache)
        x_BTD: Tensor = self.model.embed_tokens(ids_BT)
        for layer, block in enumerate(self.model.layers):
            x_BTD = block(x_BTD, layer, call)
        normed: Tensor = self.model.norm(x_BTD)
        return normed

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def is_residual_output(self, name: str) -> bool:
        return name.endswith((".o_proj.weight", ".down_proj.weight"))


class _Model(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)


class _Layer(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = _MLP(shape)

    def forward(self, x_BTD: Tensor, layer: int, call: AttentionCall) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), layer, call)
        result: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return result


class _Attention(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x_BTD: Tensor, layer: int, call: AttentionCall) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(x_BTD).unflatten(-1, heads))
        key = self.k_norm(self.k_proj(x_BTD).unflatten(-1, heads))
        value = self.v_proj(x_BTD).unflatten(-1, heads)
        result: Tensor = self.o_proj(rotary_attention(query, key, value, layer, call))
        return result


class _MLP(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.down_proj = nn.Linear(shape.mlp_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return swiglu(x_BTD, self.gate_proj, self.up_proj, self.down_proj)
