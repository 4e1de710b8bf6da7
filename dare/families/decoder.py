"""The Qwen-shaped transformer that Dream, SDAR and LLaDA-MoE have in common, under its checkpoint names.

`model.embed_tokens`, `model.layers.N.{input_layernorm, self_attn, post_attention_layernorm, mlp}`, `model.norm`,
`lm_head`. Families choose biases, per-head norms and the feed-forward part of each layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dare.families.config import DenseShape
from dare.families.layers.attention import AttentionCall, Cache, Read, Visible, rotary_attention
from dare.families.layers.norm import RMSNorm
from dare.families.layers.recompute import run_layer
from dare.families.layers.rope import rotation
from dare.families.network import Network


class StackedNetwork(Network):
    """Layers between an embedding and a head, which may be tied; never causal by itself.

    `model` holds `layers`, `norm` and, under the family's own name, the embedding.
    """

    def __init__(self, shape: DenseShape, model: nn.Module) -> None:
        super().__init__()
        self.num_layers = shape.num_layers
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.logit_scale = shape.logit_scale
        self.rotary_dim = shape.rotary_dim
        self.rope_theta = shape.rope_theta
        self.model: Any = model  # nn.Module does not know the types of its children
        self.lm_head = None if shape.is_tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The embedding of `model`."""

    def forward(
        self,
        ids_BT: Tensor,
        position_BT: Tensor,
        visible: Visible,
        cache: Cache | None = None,
        read: Read | None = None,
    ) -> Tensor:
        turn = rotation(position_BT, self.rotary_dim, self.rope_theta)
        call = AttentionCall.begin(position_BT, turn, visible, cache)
        x_BTD: Tensor = self.embedding(ids_BT)
        for index, layer in enumerate(self.model.layers):
            last = call.reading(read) if index + 1 == self.num_layers else call
            x_BTD = run_layer(layer, x_BTD, index, last, self.recompute)
        normed: Tensor = self.model.norm(x_BTD)
        return normed

    @property
    def layers(self) -> nn.ModuleList:
        found: nn.ModuleList = self.model.layers
        return found

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight


class DecoderNetwork(StackedNetwork):
    """Pre-norm layers under the names of Qwen checkpoints."""

    def __init__(self, shape: DenseShape, layers: Iterable[DecoderLayer]) -> None:
        super().__init__(shape, _Model(shape, layers))

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.model.embed_tokens
        return found

    def is_residual_output(self, name: str) -> bool:
        return name.endswith((".o_proj.weight", ".down_proj.weight", ".experts.down_proj"))


class DecoderLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, shape: DenseShape, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = mlp

    def forward(self, x_BTD: Tensor, index: int, call: AttentionCall) -> Tensor:
        x_BTD = call.outputs(x_BTD) + self.self_attn(self.input_layernorm(x_BTD), index, call)
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD))

    def feed_forward(self, normed_BTD: Tensor) -> Tensor:
        result: Tensor = self.mlp(normed_BTD)
        return result


class _Model(nn.Module):
    def __init__(self, shape: DenseShape, layers: Iterable[DecoderLayer]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)


class _Attention(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        hidden_size, has_bias = shape.hidden_size, shape.has_qkv_bias
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=has_bias)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.has_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.has_qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, index: int, call: AttentionCall) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(call.queries(x_BTD)).unflatten(-1, heads))
        key = self.k_norm(self.k_proj(x_BTD).unflatten(-1, heads))
        value = self.v_proj(x_BTD).unflatten(-1, heads)
        result: Tensor = self.o_proj(rotary_attention(query, key, value, index, call))
        return result
