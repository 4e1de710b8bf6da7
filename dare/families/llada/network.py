"""The LLaDA transformer under its official parameter names, `model.transformer.*`."""

from __future__ import annotations

from torch import Tensor, nn

from dare.families.config import DenseShape
from dare.families.layers.attention import AttentionCall, Cache, Read, Visible, rotary_attention
from dare.families.layers.mlp import swiglu
from dare.families.layers.norm import RMSNorm
from dare.families.layers.recompute import run_layer
from dare.families.layers.rope import rotation
from dare.families.network import Network


class LLaDANetwork(Network):
    """A Llama-shaped encoder: pre-norm blocks, rotary embedding, SwiGLU, no biases; never causal by itself."""

    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.num_layers = shape.num_layers
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.logit_scale = shape.logit_scale
        self.rope_theta = shape.rope_theta
        self.model = _Model(shape)

    def forward(
        self,
        ids_BT: Tensor,
        position_BT: Tensor,
        visible: Visible,
        cache: Cache | None = None,
        read: Read | None = None,
    ) -> Tensor:
        transformer = self.model.transformer
        turn = rotation(position_BT, self.head_dim, self.rope_theta)
        call = AttentionCall.begin(position_BT, turn, visible, cache)
        x_BTD: Tensor = transformer.wte(ids_BT)
        for layer, block in enumerate(transformer.blocks):
            last = call.reading(read) if layer + 1 == self.num_layers else call
            x_BTD = run_layer(block, x_BTD, layer, last, self.recompute)
        normed: Tensor = transformer.ln_f(x_BTD)
        return normed

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.transformer.blocks

    @property
    def head_weight(self) -> Tensor:
        head = self.model.transformer.ff_out
        return self.model.transformer.wte.weight if head is None else head.weight

    def is_residual_output(self, name: str) -> bool:
        return ".blocks." in name and name.endswith((".attn_out.weight", ".ff_out.weight"))


class _Model(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.transformer = _Transformer(shape)


class _Transformer(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.ln_f = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.ff_out = None if shape.is_tied else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)


class _Block(nn.Module):
    def __init__(self, shape: DenseShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        width, kv_width = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.attn_norm = RMSNorm(width, shape.norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, shape.norm_eps)
        self.ff_proj = nn.Linear(width, shape.mlp_size, bias=False)
        self.up_proj = nn.Linear(width, shape.mlp_size, bias=False)
        self.ff_out = nn.Linear(shape.mlp_size, width, bias=False)

    def forward(self, x_BTD: Tensor, layer: int, call: AttentionCall) -> Tensor:
        normed = self.attn_norm(x_BTD)
        heads = (-1, self.head_dim)
        query = self.q_proj(call.queries(normed)).unflatten(-1, heads)
        key = self.k_proj(normed).unflatten(-1, heads)
        value = self.v_proj(normed).unflatten(-1, heads)
        x_BTD = call.outputs(x_BTD) + self.attn_out(rotary_attention(query, key, value, layer, call))
        return x_BTD + swiglu(self.ff_norm(x_BTD), self.ff_proj, self.up_proj, self.ff_out)


_FROM_LLAMA = {
    "model.layers.": "model.transformer.blocks.",
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ff_norm.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.up_proj.": ".up_proj.",
    ".mlp.down_proj.": ".ff_out.",
}


def from_llama(name: str) -> str:
    """The name here of a parameter of a Llama checkpoint, whose layers compute the same."""
    for theirs, ours in _FROM_LLAMA.items():
        name = name.replace(theirs, ours)
    return name
