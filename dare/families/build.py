"""The family that a recipe asks for: a checkpoint, or a new small model for a tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from dare.core.errors import DareError
from dare.core.recipe import CreateRecipe, ModelRecipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.families.base import Family
from dare.families.weights import create_family, load_family, outline_family, read_spec, resolve_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_family(recipe: ModelRecipe, tokenizer: Any, key: Key) -> Family:
    """The policy a recipe starts from: loaded, or created for the tokenizer with keyed initial weights."""
    dtype, device = _DTYPES[recipe.dtype], pick_device(recipe.device)
    if recipe.path is not None:
        return load_family(resolve_checkpoint(recipe.path), dtype, device)
    return _create(recipe.create, tokenizer, key).to(dtype=dtype, device=device)


def family_spec(recipe: ModelRecipe, tokenizer: Any) -> FamilySpec:
    """The spec of the family that `build_family` would return, without reading a checkpoint's weights."""
    if recipe.path is not None:
        return read_spec(resolve_checkpoint(recipe.path))
    return _create(recipe.create, tokenizer, Key(0)).spec


def outline(recipe: ModelRecipe, tokenizer: Any) -> Family:
    """The family that `build_family` would return, without a checkpoint's weights: it lays canvases out."""
    if recipe.path is not None:
        return outline_family(resolve_checkpoint(recipe.path))
    return _create(recipe.create, tokenizer, Key(0))


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one. Raises DareError if CUDA is asked for and absent."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise DareError("model.device is cuda, but no GPU is visible", fix="use model.device=cpu or auto")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def _create(create: CreateRecipe | None, tokenizer: Any, key: Key) -> Family:
    if create is None:
        raise ValueError("a model recipe has a path or create options")
    return create_family(
        create.family,
        vocab_size=len(tokenizer),
        hidden_size=create.hidden_size,
        num_layers=create.num_layers,
        num_heads=create.num_heads,
        num_kv_heads=create.num_kv_heads,
        mlp_size=create.mlp_size,
        max_length=create.max_length,
        block_length=create.block_length,
        tie_embeddings=create.tie_embeddings,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=key.fold("initial weights").python_seed(),
    )
