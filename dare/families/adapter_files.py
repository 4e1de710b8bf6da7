"""Adapter folders in the format of `peft`: adapter_config.json and adapter_model.safetensors.

The config holds only what every version of peft knows. The safetensors header also names the digest of the base's
weights, and how the base was quantised; peft ignores both, `read_adapter` returns them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dare.core.errors import DareError
from dare.core.files import read_json, write_json
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe_errors import explain
from dare.families.lora import Adapter, Base

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_NOTES = "dare"  # our entry in the metadata of the weights
_DIGEST = "base_weights_sha256"
_QUANTIZED = "base_quantization"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What an adapter of peft may say beyond rank, scale and targets, and the values under which it is a plain one.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # Others changed the base that the adapter belongs to, unless peft converted them when it saved.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder that has been read.

    tensors      (A, B) of every adapted module by its official name
    base_path    folder or hub id that its config names; None if it names none
    base_digest  of the base's weights; None for an adapter that was not saved here
    """

    folder: Path
    recipe: LoraRecipe
    tensors: dict[str, tuple[Tensor, Tensor]]
    base_path: str | None
    base_digest: str | None

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values()))[0].dtype

    def base(self) -> Base | None:
        """What to write down when the adapter is saved again."""
        return Base(self.base_path, self.base_digest) if self.base_path else None


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds an adapter instead of a whole model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def write_adapter(adapter: Adapter, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write the two files into an existing directory, the matrices in `dtype` (None: that of the adapter).

    The bytes depend on nothing but the adapter, its base and `dtype`.
    """
    recipe, base = adapter.recipe, adapter.base
    tensors = {}
    for name, _, a_RI, b_OR in adapter.pairs():
        for side, tensor in (("A", a_RI), ("B", b_OR)):
            stored = tensor.detach().to(device="cpu", dtype=dtype)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = stored.contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None if base is None else base.path,
        "inference_mode": True,
        "r": recipe.rank,
        "lora_alpha": int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        "use_rslora": recipe.rslora,
        "lora_dropout": recipe.dropout,
        "target_modules": adapter.target_modules(),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if recipe.init == "gaussian" else True,
    }
    if excluded := adapter.exclude_modules():
        config["exclude_modules"] = excluded
    notes = {_DIGEST: base.digest if base is not None else None, _QUANTIZED: recipe.quantize_base}
    # One entry: safetensors writes several in an order of its own, and equal adapters are equal files.
    metadata = {_NOTES: json.dumps({key: value for key, value in notes.items() if value is not None}, sort_keys=True)}
    path = directory / WEIGHTS_NAME
    try:
        save_file(tensors, path, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise DareError("the adapter cannot be written", where=str(path), got=str(error)) from None
    write_json(directory / CONFIG_NAME, config)


def read_adapter(folder: Path) -> StoredAdapter:
    """The adapter in a folder, written here or by peft.

    Raises DareError if a file is missing or damaged, or the adapter is no plain LoRA of whole matrices.
    """
    config = _read_config(folder / CONFIG_NAME)
    tensors, metadata = _read_tensors(folder / WEIGHTS_NAME)
    recipe = _recipe({**config, _QUANTIZED: metadata.get(_QUANTIZED)}, str(folder / CONFIG_NAME))
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise DareError(
                "the adapter changes something other than the matrices of linear layers",
                where=str(folder / WEIGHTS_NAME),
                got=f"{key} {list(tensor.shape)}",
            )
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    for module, sides in pairs.items():
        if len(sides) < 2 or len(sides["A"]) != recipe.rank:
            shapes = {side: list(tensor.shape) for side, tensor in sorted(sides.items())}
            raise DareError(
                f"the adapter's matrices of {module} do not go with its config",
                where=str(folder),
                got=shapes,
                expected=f"A with {recipe.rank} rows, and a B",
            )
    return StoredAdapter(
        folder=folder,
        recipe=recipe,
        tensors={module: (sides["A"], sides["B"]) for module, sides in pairs.items()},
        base_path=config.get("base_model_name_or_path"),
        base_digest=metadata.get(_DIGEST),
    )


def load_adapter(adapter: Adapter, folder: Path) -> None:
    """Overwrite an adapter's matrices by those in a folder. Raises DareError if they are of another model."""
    stored = read_adapter(folder)
    known = None if adapter.base is None else adapter.base.digest
    if None not in (known, stored.base_digest) and known != stored.base_digest:
        raise DareError(
            "the adapter was trained on other weights than those under it now",
            where=str(folder),
            got=f"base weights {str(known)[:12]}",
            expected=f"base weights {str(stored.base_digest)[:12]}",
            fix="restore the base model's files, or start a new run",
        )
    try:
        adapter.load(stored.tensors)
    except DareError as error:
        raise error.inside(str(folder)) from None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "adapter config")
    if not isinstance(config, dict):
        raise DareError("an adapter config is a JSON object", where=str(path), got=type(config).__name__)
    for name, allowed in _PLAIN.items():
        value = config.get(name, allowed[0] if name != "peft_type" else None)
        if value not in allowed:
            raise DareError(
                "the adapter is of a kind that is not implemented",
                where=f"{path}, {name}",
                got=value,
                expected=f"{allowed[0]}: LoRA of linear layers, with one rank and nothing besides",
            )
    return config


def _recipe(config: dict[str, Any], where: str) -> LoraRecipe:
    """Rank, scale and targets."""
    targets = config.get("target_modules")
    names: Any = targets if isinstance(targets, list) else "all-linear"  # a pattern, say; the tensors have the names
    try:
        return LoraRecipe.model_validate(
            {
                "rank": config.get("r"),
                "alpha": config.get("lora_alpha"),
                "rslora": config.get("use_rslora") or False,
                "target_modules": names,
                "quantize_base": config[_QUANTIZED],
                "init": "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            }
        )
    except ValidationError as error:
        raise explain(error, LoraRecipe, where=where, what="the adapter config is") from None


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = json.loads((file.metadata() or {}).get(_NOTES, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DareError(
            "the adapter's weights cannot be read",
            where=str(path),
            got=str(error),
            fix="copy or save the adapter again; older formats (adapter_model.bin) are not read",
        ) from None
    if not tensors:
        raise DareError("the adapter is empty", where=str(path))
    return tensors, metadata
