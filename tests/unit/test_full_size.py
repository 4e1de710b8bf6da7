"""The published sizes without their weights: parameter counts and the names and shapes of every tensor.

Networks are built on the meta device from the values of the official configs. The expected names are written out
here a second time, from the published checkpoints' key lists.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dare.families.network import Network
from dare.families.weights import find_family_type

Shapes = dict[str, tuple[int, ...]]

LLADA_8B: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SDAR: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "model_type": "sdar",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 4,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def sdar(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return {**SDAR, **sizes, "num_attention_heads": heads, "num_key_value_heads": 8}


SDAR_30B: dict[str, Any] = {
    **{name: value for name, value in SDAR.items() if name not in ("mask_token_id", "block_size", "pad_token_id")},
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
}
LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "eos_token_id": 156892,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
}


def llada2(hidden: int, layers: int, heads: int, mlp: int, expert: int) -> dict[str, Any]:
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "embedding_dropout": 0.0,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": expert,
        "moe_router_enable_expert_bias": True,
        "n_group": 8,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "pad_token_id": 156892,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 600000,
        "rotary_dim": 64,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
        "vocab_size": 157184,
    }


# --- names and shapes of the published checkpoints


def llada_tensors(config: dict[str, Any]) -> Shapes:
    width, mlp, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    root = "model.transformer"
    shapes: Shapes = {f"{root}.{name}.weight": (vocab, width) for name in ("wte", "ff_out")}
    shapes[f"{root}.ln_f.weight"] = (width,)
    for n in range(config["n_layers"]):
        layer = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (width, width))
        layer |= {"ff_proj": (mlp, width), "up_proj": (mlp, width), "ff_out": (width, mlp)}
        shapes |= {f"{root}.blocks.{n}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"{root}.blocks.{n}.{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
    return shapes


def swiglu(prefix: str, width: int, mlp: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.{name}.weight": (mlp, width) for name in ("gate_proj", "up_proj")}
    return {**shapes, f"{prefix}.down_proj.weight": (width, mlp)}


def decoder_tensors(config: dict[str, Any], *, embedding: str = "embed_tokens") -> Shapes:
    """Everything outside the layers, and their two norms."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"lm_head.weight": (vocab, width), f"model.{embedding}.weight": (vocab, width)}
    shapes["model.norm.weight"] = (width,)
    for n in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{name}.weight"] = (width,)
    return shapes


def split_attention(config: dict[str, Any], head_dim: int, *, has_bias: bool, has_norm: bool) -> Shapes:
    width, shapes = config["hidden_size"], {}
    rows = {"q": config["num_attention_heads"] * head_dim}
    rows |= dict.fromkeys("kv", config["num_key_value_heads"] * head_dim)
    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}.self_attn"
        for name, count in rows.items():
            shapes[f"{prefix}.{name}_proj.weight"] = (count, width)
            if has_bias:
                shapes[f"{prefix}.{name}_proj.bias"] = (count,)
        shapes[f"{prefix}.o_proj.weight"] = (width, rows["q"])
        if has_norm:
            shapes |= {f"{prefix}.{name}_norm.weight": (head_dim,) for name in "qk"}
    return shapes


def experts(prefix: str, count: int, width: int, size: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.gate.weight": (count, width)}
    for expert in range(count):
        shapes |= swiglu(f"{prefix}.experts.{expert}", width, size)
    return shapes


def dream_tensors(config: dict[str, Any]) -> Shapes:
    shapes = decoder_tensors(config) | split_attention(config, 128, has_bias=True, has_norm=False)
    for n in range(config["num_hidden_layers"]):
        shapes |= swiglu(f"model.layers.{n}.mlp", config["hidden_size"], config["intermediate_size"])
    return shapes


def sdar_tensors(config: dict[str, Any]) -> Shapes:
    shapes = decoder_tensors(config) | split_attention(config, 128, has_bias=False, has_norm=True)
    for n in range(config["num_hidden_layers"]):
        shapes |= swiglu(f"model.layers.{n}.mlp", config["hidden_size"], config["intermediate_size"])
    return shapes


def qwen_moe_tensors(config: dict[str, Any]) -> Shapes:
    size = config.get("moe_intermediate_size") or config["expert_intermediate_size"]
    shapes = decoder_tensors(config) | split_attention(config, 128, has_bias=False, has_norm=True)
    for n in range(config["num_hidden_layers"]):
        shapes |= experts(f"model.layers.{n}.mlp", config["num_experts"], config["hidden_size"], size)
    return shapes


def llada2_tensors(config: dict[str, Any]) -> Shapes:
    width, size, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    shapes = decoder_tensors(config, embedding="word_embeddings")
    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}"
        shapes[f"{prefix}.attention.query_key_value.weight"] = ((heads + 2 * 4) * 128, width)
        shapes[f"{prefix}.attention.dense.weight"] = (width, heads * 128)
        shapes |= {f"{prefix}.attention.{name}_layernorm.weight": (128,) for name in ("query", "key")}
        if n == 0:
            shapes |= swiglu(f"{prefix}.mlp", width, config["intermediate_size"])
            continue
        shapes |= experts(f"{prefix}.mlp", 256, width, size) | swiglu(f"{prefix}.mlp.shared_experts", width, size)
        shapes[f"{prefix}.mlp.gate.expert_bias"] = (256,)
    return shapes


# name, config, expected tensors, their number, parameters, family
PUBLISHED = [
    ("LLaDA-8B", LLADA_8B, llada_tensors, 291, 8_015_581_184, "llada"),
    ("Dream-7B", DREAM_7B, dream_tensors, 339, 7_615_616_512, "dream"),
    ("SDAR-1.7B", sdar(2048, 6144, 28, 16), sdar_tensors, 311, 2_031_739_904, "sdar"),
    ("SDAR-4B", sdar(2560, 9728, 36, 32), sdar_tensors, 399, 4_411_424_256, "sdar"),
    ("SDAR-8B", sdar(4096, 12288, 36, 32), sdar_tensors, 399, 8_190_735_360, "sdar"),
    ("SDAR-30B-A3B", SDAR_30B, qwen_moe_tensors, 18867, 30_532_122_624, "sdar_moe"),
    ("LLaDA-MoE-7B-A1B", LLADA_MOE, qwen_moe_tensors, 3219, 7_356_880_896, "llada_moe"),
    ("LLaDA2-mini", llada2(2048, 20, 16, 5120, 512), llada2_tensors, 14813, 16_255_638_528, "llada2"),
    ("LLaDA2-flash", llada2(4096, 32, 32, 9216, 1024), llada2_tensors, 24161, 102_889_697_280, "llada2"),
]


@pytest.mark.parametrize(
    ("config", "tensors", "num_tensors", "num_parameters", "family"),
    [row[1:] for row in PUBLISHED],
    ids=[row[0] for row in PUBLISHED],
)
def test_published_size(
    config: dict[str, Any], tensors: Any, num_tensors: int, num_parameters: int, family: str
) -> None:
    family_type = find_family_type(config, where="test")
    assert family_type.name == family
    spec = family_type.spec(config, None)
    assert spec.vocab_size == config["vocab_size"]
    with torch.device("meta"):
        network: Network = family_type.build(config)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == tensors(config)
    assert len(network.state_dict()) == num_tensors
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters
