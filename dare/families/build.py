"""The family that a recipe asks for: a checkpoint, or a new small model for a tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import CreateRecipe, ModelRecipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.families.adapter_files import is_adapter
from dare.families.base import Family
from dare.families.checkpoint import base_folder, checkpoint_spec, describe_base, load_checkpoint
from dare.families.layers.quantized import require_bitsandbytes
from dare.families.lora import add_adapter, merge_adapter, outline_adapter
from dare.families.weights import create_family, load_family, outline_family, resolve_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by their names in a recipe


def build_family(recipe: ModelRecipe, tokenizer: Any, key: Key, lora: LoraRecipe | None = None) -> Family:
    """The policy a recipe starts from: loaded, or created for the tokenizer with keyed initial weights.

    With `lora`, a new adapter is on it and nothing else is trainable. Without, an adapter checkpoint is merged into
    its base, so that all weights are trained. Raises DareError for `lora` on a checkpoint that is itself an adapter.
    """
    dtype, device = DTYPES[recipe.dtype], pick_device(recipe.device)
    if recipe.path is None:
        if lora is not None:
            raise ValueError("an adapter of a new model would have no base to be loaded with")
        return _create(recipe.create, tokenizer, key).to(dtype=dtype, device=device)
    folder = resolve_checkpoint(recipe.path)
    if lora is None:
        family = load_checkpoint(folder, dtype, device, is_quantized=False)
        if family.adapter is not None:
            merge_adapter(family)
        return family
    if is_adapter(folder):
        raise DareError(
            "a new adapter needs a whole model under it",
            where="model.path",
            got=f"{recipe.path}, an adapter",
            fix=f"merge it first, dare export {recipe.path} --to FOLDER, and train on FOLDER",
        )
    if lora.quantize_base is not None:
        require_bitsandbytes(device)  # before a large model is loaded in vain
    family = load_family(folder, dtype, device)
    add_adapter(family, lora, key.fold("lora"), describe_base(recipe.path, folder))
    return family


def family_spec(recipe: ModelRecipe, tokenizer: Any) -> FamilySpec:
    """The spec of the family that `build_family` would return, without reading a checkpoint's weights."""
    if recipe.path is not None:
        return checkpoint_spec(resolve_checkpoint(recipe.path))
    return _create(recipe.create, tokenizer, Key(0)).spec


def outline(recipe: ModelRecipe, tokenizer: Any, lora: LoraRecipe | None = None) -> Family:
    """The family that `build_family` would return, without a checkpoint's weights: it lays canvases out."""
    if recipe.path is None:
        return _create(recipe.create, tokenizer, Key(0))
    family = outline_family(base_folder(resolve_checkpoint(recipe.path)))
    if lora is not None:
        outline_adapter(family, lora)
    return family


def outline_sizes(recipe: ModelRecipe, lora: LoraRecipe | None = None) -> Family:
    """The family of a checkpoint as `outline` has it; the folder needs no weights and no tokenizer.

    Raises DareError for a new model, whose vocabulary is that of a tokenizer which does not exist yet.
    """
    if recipe.path is None:
        raise DareError(
            "a model that does not exist yet has no sizes to plan with",
            where="model.create",
            fix="give a folder with a config.json as model.path",
        )
    return outline(recipe, None, lora)


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
