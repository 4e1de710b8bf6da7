"""SDAR-MoE's config.json, with its Qwen3-MoE-style field names, read strictly."""

from __future__ import annotations

import dataclasses

from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.families.config import Config, DenseShape, Fields, ModelSizes, MoEShape, code_map, matches_architecture
from dare.families.sdar import config as sdar

_MODEL_TYPE, ARCHITECTURE = "sdar_moe", "SDARMoeForCausalLM"
_NEW_EXPERTS, _NEW_EXPERTS_PER_TOKEN = 8, 2

# Absent, these mean what is implemented.
_OPTIONAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}


def is_sdar_moe(config: Config) -> bool:
    return matches_architecture(config, _MODEL_TYPE, ARCHITECTURE)


def read_shapes(config: Config) -> tuple[DenseShape, MoEShape, bool]:
    """The network's sizes, and whether routing weights add up to 1.

    Raises DareError for a field that is missing, malformed or not implemented.
    """
    fields = Fields(config)
    fields.check(_OPTIONAL)
    is_moe = _moe_layers(fields)
    dense = DenseShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=len(is_moe),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        mlp_size=fields.integer("intermediate_size"),
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        is_tied=fields.boolean("tie_word_embeddings", False),
        has_qk_norm=True,
    )
    moe = MoEShape(
        num_experts=fields.integer("num_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_size=fields.integer("moe_intermediate_size"),
        is_moe=is_moe,
    )
    return dense, moe, fields.boolean("norm_topk_prob")


def family_spec(config: Config, generation_config: Config | None = None) -> FamilySpec:
    """What SDAR-MoE is to the rest of the framework: SDAR, whose grid and mask id its own configs leave out.

    Raises DareError like `read_shapes`.
    """
    return dataclasses.replace(sdar.family_spec(config, generation_config), name=_MODEL_TYPE)


def new_config(sizes: ModelSizes) -> Config:
    """A config.json for a new model with 8 experts of half the width each, 2 per token."""
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": code_map("sdar_moe", "SDARMoeConfig", ARCHITECTURE),
        "model_type": _MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": sizes.block_length or sdar.BLOCK_LENGTH,
        "decoder_sparse_step": 1,
        "bos_token_id": sizes.eos_id,
        "eos_token_id": sizes.eos_id,
        "head_dim": sizes.head_dim or sizes.hidden_size // sizes.num_heads,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp_size,
        "mask_token_id": sizes.mask_id,
        "max_position_embeddings": sizes.max_length,
        "max_window_layers": sizes.num_layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": max(1, sizes.mlp_size // _NEW_EXPERTS_PER_TOKEN),
        "norm_topk_prob": True,
        "num_attention_heads": sizes.num_heads,
        "num_experts": _NEW_EXPERTS,
        "num_experts_per_tok": _NEW_EXPERTS_PER_TOKEN,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads or sizes.num_heads,
        "output_router_logits": False,
        "pad_token_id": sizes.pad_id,
        "rms_norm_eps": sizes.norm_eps or 1e-6,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.0,
        "rope_theta": sizes.rope_theta or 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": sizes.tie_embeddings,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_size,
    }


def _moe_layers(fields: Fields) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`-th layer has experts, unless it is listed as dense."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.config.get("mlp_only_layers") or []
    num_layers = fields.layers("num_hidden_layers")
    if not isinstance(dense, list) or not all(type(index) is int and 0 <= index < num_layers for index in dense):
        raise DareError(
            "the list of dense layers cannot be used",
            where="config.json, mlp_only_layers",
            got=dense,
            expected=f"layer numbers below {num_layers}",
        )
    return tuple(index not in dense and (index + 1) % step == 0 for index in range(num_layers))
