"""The config.json of LLaDA2.x, read strictly. The official class has other defaults, so every field must be there."""

from __future__ import annotations

from dataclasses import dataclass

from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.families.config import (
    Config,
    DenseShape,
    Fields,
    ModelSizes,
    MoEShape,
    code_map,
    eos_ids,
    matches_architecture,
)

_MODEL_TYPE, ARCHITECTURE = "llada2_moe", "LLaDA2MoeModelLM"
_BLOCK_LENGTH = 32  # published configs have neither a block length nor a mask id
_MASK_ID = 156895
_NEW_EXPERTS, _NEW_EXPERTS_PER_TOKEN = 8, 2

# Absent, these mean something else in the official code.
_CHOSEN: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False,),
}
# Absent, these mean what is implemented.
_OPTIONAL: dict[str, tuple[object, ...]] = {
    "attention_dropout": (0.0, None),
    "embedding_dropout": (0.0, None),
    "moe_router_enable_expert_bias": (True,),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "norm_topk_prob": (True,),
    "output_dropout": (0.0, None),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "router_dtype": ("fp32", "float32"),
    "score_function": ("sigmoid",),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False, None),
    "using_split_qkv_in_self_attention": (False, None),
}


@dataclass(frozen=True)
class Grouping:
    """How the router limits a token to some groups of experts."""

    num_groups: int
    groups_per_token: int
    scale: float


def is_llada2(config: Config) -> bool:
    return matches_architecture(config, _MODEL_TYPE, ARCHITECTURE)


def read_shapes(config: Config) -> tuple[DenseShape, MoEShape, Grouping]:
    """The network's sizes. Raises DareError for a field that is missing, malformed or not implemented."""
    fields = Fields(config)
    fields.check(_CHOSEN, is_required=True)
    fields.check(_OPTIONAL)
    num_layers = fields.layers("num_hidden_layers")
    num_dense = fields.integer("first_k_dense_replace", minimum=0)
    expert_size = fields.integer("moe_intermediate_size")
    dense = DenseShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        mlp_size=fields.integer("intermediate_size"),
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        is_tied=fields.boolean("tie_word_embeddings", False),
        rotary_fraction=fields.number("partial_rotary_factor"),
        has_qk_norm=True,
    )
    # Written beside the fraction in published configs, and read by nobody: it must not say something else.
    fields.check({"rotary_dim": (dense.rotary_dim, None)})
    moe = MoEShape(
        num_experts=fields.integer("num_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_size=expert_size,
        is_moe=tuple(index >= num_dense for index in range(num_layers)),
        shared_size=expert_size * fields.integer("num_shared_experts", 0, minimum=0),
    )
    return dense, moe, _grouping(fields, moe)


def family_spec(config: Config, generation_config: Config | None = None) -> FamilySpec:
    """What LLaDA2.x is to the rest of the framework; its EOS is its padding. Raises DareError like `read_shapes`."""
    fields = Fields(config)
    vocab_size = fields.integer("vocab_size")
    has_pad = config.get("pad_token_id") is not None
    pad_id = fields.token("pad_token_id", vocab_size) if has_pad else None
    eos = eos_ids(config, generation_config, vocab_size, pad_id)
    return FamilySpec(
        name="llada2",
        attention="block_causal",
        block_grid=fields.block_grid(),
        block_length=fields.integer("block_size", _BLOCK_LENGTH),
        is_shifted=False,
        mask_id=fields.token("mask_token_id", vocab_size, _MASK_ID),
        eos_ids=eos,
        pad_id=eos[0] if pad_id is None else pad_id,
        vocab_size=vocab_size,
        max_length=fields.integer("max_position_embeddings"),
        sft_preset="llada2",
    )


def new_config(sizes: ModelSizes) -> Config:
    """A config.json for a new model: a dense layer, then 8 experts of half the width each, 2 per token."""
    expert_size = max(1, sizes.mlp_size // _NEW_EXPERTS_PER_TOKEN)
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_heads
    return {
        "architectures": [ARCHITECTURE],
        "attention_dropout": 0.0,
        "auto_map": code_map("llada2_moe", "LLaDA2MoeConfig", ARCHITECTURE, "LLaDA2MoeModel"),
        "model_type": _MODEL_TYPE,
        "block_size": sizes.block_length or _BLOCK_LENGTH,
        "embedding_dropout": 0.0,
        "eos_token_id": sizes.eos_id,
        "first_k_dense_replace": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp_size,
        "mask_token_id": sizes.mask_id,
        "max_position_embeddings": sizes.max_length,
        "moe_intermediate_size": expert_size,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "max_window_layers": sizes.num_layers,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.num_heads,
        "num_experts": _NEW_EXPERTS,
        "num_experts_per_tok": _NEW_EXPERTS_PER_TOKEN,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads or sizes.num_heads,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": sizes.pad_id,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": sizes.norm_eps or 1e-6,
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta or 600000,
        "rotary_dim": head_dim // 2,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": sizes.tie_embeddings,
        "topk_group": 2,
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
        "vocab_size": sizes.vocab_size,
    }


def _grouping(fields: Fields, moe: MoEShape) -> Grouping:
    num_groups, kept = fields.integer("n_group"), fields.integer("topk_group")
    fields.divides("n_group", num_groups, "num_experts", moe.num_experts)
    group_size = moe.num_experts // num_groups
    if group_size < 2 or kept > num_groups or moe.experts_per_token > kept * group_size:
        raise DareError(
            "the router cannot pick its experts from its groups",
            where="config.json, n_group and topk_group",
            got=f"{num_groups} groups of {group_size} experts, {kept} kept, {moe.experts_per_token} experts per token",
            expected="groups of at least 2, of which the kept ones hold enough experts",
        )
    return Grouping(num_groups, kept, fields.number("routed_scaling_factor"))
