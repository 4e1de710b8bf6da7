"""Autoregressive checkpoints as raw material: their layout, sizes, tensors and tokenizer, read without their code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dare.core.errors import DareError
from dare.core.files import read_json
from dare.families.config import Config, Fields, matches_architecture
from dare.families.hub import resolve_checkpoint
from dare.families.shards import Shards
from dare.families.tokenizer import load_tokenizer


class Layout(NamedTuple):
    """An architecture: how to recognise its config.json, and the fields that would make it compute something else."""

    model_type: str
    architecture: str
    implemented: Mapping[str, tuple[object, ...]]


_COMMON: dict[str, tuple[object, ...]] = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
}
LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", "LlamaForCausalLM", _COMMON | {"attention_bias": (False, None)}),
    "qwen2": Layout("qwen2", "Qwen2ForCausalLM", _COMMON),
    "qwen3": Layout("qwen3", "Qwen3ForCausalLM", _COMMON | {"attention_bias": (False, None)}),
}


TOKEN_ROWS = ("model.embed_tokens.weight", "lm_head.weight")  # tensors with a row per token, in every layout


@dataclass(frozen=True)
class CausalSizes:
    """The network of an autoregressive checkpoint."""

    vocab_size: int  # rows of the embedding
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_length: int
    rope_theta: float
    norm_eps: float
    is_tied: bool


@dataclass(frozen=True)
class CausalCheckpoint:
    """`tensors()` yields every tensor with its official name, one at a time; the head of a tied model is left out."""

    layout: str
    config: Config
    generation_config: Config | None
    sizes: CausalSizes
    dtype: torch.dtype
    tokenizer: Any
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]


def read_causal(source: str | Path) -> CausalCheckpoint:
    """An autoregressive checkpoint: a folder or hub id with safetensors, or a GGUF file (read by transformers).

    Raises DareError for files that are missing, quantised in another way than GGUF, or of an unknown layout.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _read_gguf(path)
    folder = resolve_checkpoint(source)
    config = _normalised(read_json(folder / "config.json", "model config"))
    layout, sizes = _describe(config, str(folder / "config.json"))
    generation_path = folder / "generation_config.json"
    shards = Shards(folder)
    dtypes = set(shards.dtypes.values())
    return CausalCheckpoint(
        layout=layout,
        config=config,
        generation_config=read_json(generation_path, "generation config") if generation_path.is_file() else None,
        sizes=sizes,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        tokenizer=_require_tokenizer(load_tokenizer(folder), str(folder)),
        tensors=lambda: _without_tied_head(shards.tensors(), sizes),
    )


def _read_gguf(path: Path) -> CausalCheckpoint:
    """Dequantised to float32; needs the package `gguf`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise DareError("checkpoint not found", where=str(path), fix="check the path of the GGUF file")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise DareError(
            "transformers reads GGUF files with a package that is not installed",
            where=str(path),
            got=str(error).strip().splitlines()[0],
            fix="pip install gguf",
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise DareError(
            "the GGUF file cannot be read", where=str(path), got=f"{type(error).__name__}: {error}"
        ) from None
    # The weights are plain by now, although the config still says how the file stores them.
    config = _normalised(
        {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": None}
    )
    layout, sizes = _describe(config, str(path))
    return CausalCheckpoint(
        layout=layout,
        config=config,
        generation_config=None,
        sizes=sizes,
        dtype=torch.float32,
        tokenizer=_require_tokenizer(tokenizer, str(path)),
        tensors=lambda: _without_tied_head(iter(model.state_dict().items()), sizes),
    )


def _normalised(stored: Any) -> Config:
    """A config with the rotary fields where transformers 4 has them; transformers 5 nests them."""
    if not isinstance(stored, dict):
        raise DareError("a config is a JSON object", where="config.json", got=type(stored).__name__)
    config: Config = dict(stored)
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
        is_plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
        if not is_plain:
            config["rope_scaling"] = rope
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        config["rope_scaling"] = None
    return config


def _describe(config: Config, where: str) -> tuple[str, CausalSizes]:
    layout = _find_layout(config, where)
    fields = Fields(config)
    try:
        fields.check({**LAYOUTS[layout].implemented, "quantization_config": (None,)})
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        return layout, CausalSizes(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.layers("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=fields.integer("head_dim", hidden_size // num_heads),
            mlp_size=fields.integer("intermediate_size"),
            max_length=fields.integer("max_position_embeddings"),
            rope_theta=fields.number("rope_theta", 10000.0),
            norm_eps=fields.number("rms_norm_eps"),
            is_tied=fields.boolean("tie_word_embeddings", False),
        )
    except DareError as error:
        raise error.inside(where) from None


def _find_layout(config: Config, where: str) -> str:
    for name, layout in LAYOUTS.items():
        if matches_architecture(config, layout.model_type, layout.architecture):
            return name
    raise DareError(
        "this checkpoint is not autoregressive in a layout that can be converted",
        where=where,
        got=f"model_type {config.get('model_type')}, architectures {config.get('architectures')}",
        expected=", ".join(layout.architecture for layout in LAYOUTS.values()),
    )


def _without_tied_head(tensors: Iterator[tuple[str, Tensor]], sizes: CausalSizes) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors if not (sizes.is_tied and name == "lm_head.weight"))


def _require_tokenizer(tokenizer: Any, where: str) -> Any:
    if tokenizer is None:
        raise DareError(
            "the checkpoint has no tokenizer, which a mask token must be added to",
            where=where,
            fix="put its tokenizer files into the folder",
        )
    return tokenizer
