"""LLaDA's config.json, with its OLMo-style field names, read strictly."""

from __future__ import annotations

from dare.core.spec import FamilySpec
from dare.families.config import Config, DenseShape, Fields, ModelSizes, code_map, eos_ids, matches_architecture

_MODEL_TYPE, ARCHITECTURE = "llada", "LLaDAModelLM"
_BLOCK_LENGTH = 32

# Absent, these mean something else in the official code (a sequential GPT block without rotary embedding).
_CHOSEN: dict[str, tuple[object, ...]] = {
    "activation_type": ("silu",),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
}
# Absent, these mean what is implemented.
_OPTIONAL: dict[str, tuple[object, ...]] = {
    "alibi": (False,),
    "attention_dropout": (0.0, None),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "clip_qkv": (None,),
    "embedding_dropout": (0.0, None),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False, None),
    "residual_dropout": (0.0, None),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
}


def is_llada(config: Config) -> bool:
    """Whether a config is of dense LLaDA; copies of LLaDA-MoE share its model type and differ by `num_experts`."""
    return matches_architecture(config, _MODEL_TYPE, ARCHITECTURE) and not config.get("num_experts")


def read_shape(config: Config) -> DenseShape:
    """The network's sizes. Raises DareError for a field that is missing, malformed or not implemented."""
    fields = Fields(config)
    fields.check(_CHOSEN, is_required=True)
    fields.check(_OPTIONAL)
    hidden_size, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    fields.divides("n_heads", num_heads, "d_model", hidden_size)
    has_mlp_size = config.get("mlp_hidden_size") is not None
    return DenseShape(
        vocab_size=_vocab_size(fields),
        hidden_size=hidden_size,
        num_layers=fields.layers("n_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=hidden_size // num_heads,
        mlp_size=fields.integer("mlp_hidden_size") if has_mlp_size else fields.integer("mlp_ratio") * hidden_size,
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        is_tied=fields.boolean("weight_tying"),
        logit_scale=hidden_size**-0.5 if fields.boolean("scale_logits", False) else 1.0,
    )


def family_spec(config: Config, generation_config: Config | None = None) -> FamilySpec:
    """What LLaDA is to the rest of the framework. Raises DareError like `read_shape`.

    The official config has no block length, only samplers do; `block_size` in a config of ours is kept.
    """
    fields = Fields(config)
    vocab_size = _vocab_size(fields)
    eos = eos_ids(config, generation_config, vocab_size)
    return FamilySpec(
        name=_MODEL_TYPE,
        attention="full",
        block_grid="completion",
        block_length=fields.integer("block_size", _BLOCK_LENGTH),
        is_shifted=False,
        mask_id=fields.token("mask_token_id", vocab_size),
        eos_ids=eos,
        pad_id=fields.token("pad_token_id", vocab_size, eos[0]),
        vocab_size=vocab_size,
        max_length=fields.integer("max_sequence_length"),
    )


def new_config(sizes: ModelSizes) -> Config:
    """A config.json for a new model, with the constants of the released 8B models."""
    config: Config = {
        "architectures": [ARCHITECTURE],
        "auto_map": code_map("llada", "LLaDAConfig", ARCHITECTURE),
        "model_type": _MODEL_TYPE,
        **{name: values[0] for name, values in (_CHOSEN | _OPTIONAL).items()},
        "attention_layer_norm_with_affine": True,
        "flash_attention": False,
        "init_device": "cpu",
        "mlp_ratio": 4,
        "scale_logits": False,
        "use_cache": False,  # the official code refuses to run with it
        "d_model": sizes.hidden_size,
        "n_layers": sizes.num_layers,
        "n_heads": sizes.num_heads,
        "n_kv_heads": sizes.num_kv_heads or sizes.num_heads,
        "mlp_hidden_size": sizes.mlp_size,
        "vocab_size": sizes.vocab_size,
        "embedding_size": sizes.vocab_size,
        "max_sequence_length": sizes.max_length,
        "rope_theta": sizes.rope_theta or 500000.0,
        "rms_norm_eps": sizes.norm_eps or 1e-5,
        "weight_tying": sizes.tie_embeddings,
        "mask_token_id": sizes.mask_id,
        "eos_token_id": sizes.eos_id,
        "pad_token_id": sizes.pad_id,
    }
    if sizes.block_length is not None:
        config["block_size"] = sizes.block_length
    return config


def _vocab_size(fields: Fields) -> int:
    """Rows of the embedding table, which may be padded beyond the tokenizer's vocabulary."""
    vocab_size = fields.integer("vocab_size")
    return fields.integer("embedding_size", vocab_size, minimum=vocab_size)
