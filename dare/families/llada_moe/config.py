"""LLaDA-MoE's config.json, with its OLMoE-style field names, read strictly."""

from __future__ import annotations

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

_MODEL_TYPE, ARCHITECTURE = "lladamoe", "LLaDAMoEModelLM"
_SHARED_MODEL_TYPE = "llada"  # some published copies carry the model type of dense LLaDA
_BLOCK_LENGTH = 32
_MASK_ID = 156895  # published configs without mask_token_id mean this one
_NEW_EXPERTS, _NEW_EXPERTS_PER_TOKEN = 8, 2

# Absent, these mean what is implemented.
_OPTIONAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "clip_qkv": (None,),
    "hidden_act": ("silu",),
    "moe_router_score_function": ("softmax",),
    "norm_topk_prob": (False, None),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "routed_scaling_factor": (1.0, None),
    "router_num_group": (None,),
    "router_topk_group": (None,),
}


def is_llada_moe(config: Config) -> bool:
    """Whether a config is of LLaDA-MoE: by its architecture, or by a model type of LLaDA and experts."""
    if matches_architecture(config, _MODEL_TYPE, ARCHITECTURE):
        return True
    return matches_architecture(config, _SHARED_MODEL_TYPE, ARCHITECTURE) and bool(config.get("num_experts"))


def read_shapes(config: Config) -> tuple[DenseShape, MoEShape, bool]:
    """The network's sizes, and whether the routers have an expert bias.

    Raises DareError for a field that is missing, malformed or not implemented.
    """
    fields = Fields(config)
    fields.check(_OPTIONAL)
    is_moe = _moe_layers(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    fields.check({"head_dim": (hidden_size // num_heads, None)})
    dense = DenseShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=len(is_moe),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=hidden_size // num_heads,
        mlp_size=fields.integer("dense_intermediate_size") if not all(is_moe) else 0,
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        is_tied=fields.boolean("tie_word_embeddings", False),
        rotary_fraction=fields.number("partial_rotary_factor", 1.0),
        has_qk_norm=fields.boolean("qk_layernorm"),
    )
    moe = MoEShape(
        num_experts=fields.integer("num_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_size=fields.integer("expert_intermediate_size"),
        is_moe=is_moe,
        shared_size=fields.integer("shared_expert_intermediate_size", 0, minimum=0),
    )
    return dense, moe, fields.boolean("moe_router_enable_expert_bias", False)


def family_spec(config: Config, generation_config: Config | None = None) -> FamilySpec:
    """What LLaDA-MoE is to the rest of the framework. Raises DareError like `read_shapes`.

    The official config has no block length, only samplers do; `block_size` in a config of ours is kept.
    """
    fields = Fields(config)
    vocab_size = fields.integer("vocab_size")
    eos = eos_ids(config, generation_config, vocab_size)
    return FamilySpec(
        name="llada_moe",
        attention="full",
        block_grid="completion",
        block_length=fields.integer("block_size", _BLOCK_LENGTH),
        is_shifted=False,
        mask_id=fields.token("mask_token_id", vocab_size, _MASK_ID),
        eos_ids=eos,
        pad_id=fields.token("pad_token_id", vocab_size, eos[0]),
        vocab_size=vocab_size,
        max_length=fields.integer("max_position_embeddings"),
    )


def new_config(sizes: ModelSizes) -> Config:
    """A config.json for a new model with 8 experts of half the width each, 2 per token."""
    config: Config = {
        "architectures": [ARCHITECTURE],
        "auto_map": code_map("lladamoe", "LLaDAConfig", ARCHITECTURE),
        "model_type": _MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "dense_intermediate_size": sizes.mlp_size,
        "eos_token_id": sizes.eos_id,
        "expert_intermediate_size": max(1, sizes.mlp_size // _NEW_EXPERTS_PER_TOKEN),
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "mask_token_id": sizes.mask_id,
        "max_position_embeddings": sizes.max_length,
        "moe_layer_freq": [1] * sizes.num_layers,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": sizes.num_heads,
        "num_experts": _NEW_EXPERTS,
        "num_experts_per_tok": _NEW_EXPERTS_PER_TOKEN,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads or sizes.num_heads,
        "output_router_logits": False,
        "pad_token_id": sizes.pad_id,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": sizes.norm_eps or 1e-5,
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta or 50000.0,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.0,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": sizes.tie_embeddings,
        "use_cache": False,
        "vocab_size": sizes.vocab_size,
    }
    if sizes.block_length is not None:
        config["block_size"] = sizes.block_length
    return config


def _moe_layers(fields: Fields) -> tuple[bool, ...]:
    """`moe_layer_freq` holds a 1 for each layer with experts and a 0 for each dense one."""
    num_layers, pattern = fields.layers("num_hidden_layers"), fields.config.get("moe_layer_freq")
    if not isinstance(pattern, list) or len(pattern) != num_layers or not all(item in (0, 1) for item in pattern):
        raise DareError(
            "the pattern of layers with experts cannot be used",
            where="config.json, moe_layer_freq",
            got=pattern,
            expected=f"a list of {num_layers} zeros and ones",
        )
    return tuple(bool(item) for item in pattern)
