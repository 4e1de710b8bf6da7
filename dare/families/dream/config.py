"""Dream's config.json, with its Qwen2-style field names, read strictly."""

from __future__ import annotations

from dare.core.spec import FamilySpec
from dare.families.config import Config, DenseShape, Fields, ModelSizes, code_map, eos_ids, matches_architecture

_MODEL_TYPE, ARCHITECTURE = "Dream", "DreamModel"
_BLOCK_LENGTH = 32
_MASK_ID = 151666  # published configs without mask_token_id mean this one

# Absent, these mean what is implemented.
_OPTIONAL: dict[str, tuple[object, ...]] = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


def is_dream(config: Config) -> bool:
    return matches_architecture(config, _MODEL_TYPE, ARCHITECTURE)


def read_shape(config: Config) -> DenseShape:
    """The network's sizes. Raises DareError for a field that is missing, malformed or not implemented."""
    fields = Fields(config)
    fields.check(_OPTIONAL)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.divides("num_attention_heads", num_heads, "hidden_size", hidden_size)
    # The official code takes no other head size, so a config that names one is not of this architecture.
    fields.check({"head_dim": (hidden_size // num_heads, None)})
    return DenseShape(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.layers("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=hidden_size // num_heads,
        mlp_size=fields.integer("intermediate_size"),
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        is_tied=fields.boolean("tie_word_embeddings", False),
        has_qkv_bias=True,
    )


def family_spec(config: Config, generation_config: Config | None = None) -> FamilySpec:
    """What Dream is to the rest of the framework. Raises DareError like `read_shape`.

    The official config has no block length, only samplers do; `block_size` in a config of ours is kept.
    """
    fields = Fields(config)
    vocab_size = fields.integer("vocab_size")
    eos = eos_ids(config, generation_config, vocab_size)
    return FamilySpec(
        name="dream",
        attention="full",
        block_grid="completion",
        block_length=fields.integer("block_size", _BLOCK_LENGTH),
        is_shifted=True,
        mask_id=fields.token("mask_token_id", vocab_size, _MASK_ID),
        eos_ids=eos,
        pad_id=fields.token("pad_token_id", vocab_size, eos[0]),
        vocab_size=vocab_size,
        max_length=fields.integer("max_position_embeddings"),
        sft_preset="dream",
    )


def new_config(sizes: ModelSizes) -> Config:
    """A config.json for a new model, with the constants of the released 7B models."""
    config: Config = {
        "architectures": [ARCHITECTURE],
        "auto_map": code_map("dream", "DreamConfig", ARCHITECTURE),
        "model_type": _MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": sizes.eos_id,
        "eos_token_id": sizes.eos_id,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp_size,
        "mask_token_id": sizes.mask_id,
        "max_position_embeddings": sizes.max_length,
        "max_window_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads or sizes.num_heads,
        "pad_token_id": sizes.pad_id,
        "rms_norm_eps": sizes.norm_eps or 1e-6,
        "rope_scaling": None,
        "rope_theta": sizes.rope_theta or 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": sizes.tie_embeddings,
        "use_cache": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab_size,
    }
    if sizes.block_length is not None:
        config["block_size"] = sizes.block_length
    return config
