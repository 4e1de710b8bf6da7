"""A checkpoint folder of either kind: a whole model, or an adapter whose base is found and verified."""

from __future__ import annotations

from pathlib import Path

import torch

from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.families.adapter_files import StoredAdapter, is_adapter, read_adapter
from dare.families.base import Family
from dare.families.hub import resolve_checkpoint
from dare.families.lora import Base, restore_adapter
from dare.families.shards import Shards
from dare.families.weights import load_family, read_spec


def load_checkpoint(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    base: str | Path | None = None,
    is_quantized: bool = True,
) -> Family:
    """The family in a folder; that of an adapter folder is its base with the adapter on, not merged.

    dtype  None: the stored one, which for an adapter that was trained here is that of its training
    base   for an adapter: folder or hub id to use instead of the base that it names
    is_quantized  quantise the base of an adapter as it was in training, if it was
    Raises DareError as `load_family` does, for a base that is not found or whose weights are not those that the
    adapter was trained on, and for an adapter that does not fit.
    """
    if not is_adapter(folder):
        _require_no_base(folder, base)
        return load_family(folder, dtype, device)
    stored = read_adapter(folder)
    found = _find_base(stored, base)
    _verify(stored, found)
    if dtype is None and stored.base_digest is not None:
        dtype = stored.dtype
    recipe = stored.recipe if is_quantized else stored.recipe.model_copy(update={"quantize_base": None})
    family = load_family(found, dtype, device)
    try:
        restore_adapter(family, recipe, stored.tensors, _rebased(stored, base))
    except DareError as error:
        raise error.inside(str(folder)) from None
    return family


def checkpoint_spec(folder: Path) -> FamilySpec:
    """The spec of the family that `load_checkpoint` would return, without reading weights."""
    return read_spec(_find_base(read_adapter(folder), None) if is_adapter(folder) else folder)


def base_folder(folder: Path, base: str | Path | None = None) -> Path:
    """The whole checkpoint behind a folder: itself, or the base of an adapter. Raises DareError if there is none."""
    if is_adapter(folder):
        return _find_base(read_adapter(folder), base)
    _require_no_base(folder, base)
    return folder


def describe_base(path: str, folder: Path) -> Base:
    """What an adapter writes down about the checkpoint `folder` that a user called `path`; reads every weight.

    A folder is named absolutely, so that the adapter finds it from anywhere; a hub id stays one.
    """
    is_local = Path(path).expanduser().is_dir()
    return Base(str(folder.resolve()) if is_local else path, Shards(folder).digest())


def _require_no_base(folder: Path, base: str | Path | None) -> None:
    if base is not None:
        raise DareError("only an adapter has a base", where=str(folder), got="a whole model", fix="leave the base out")


def _find_base(stored: StoredAdapter, base: str | Path | None) -> Path:
    name = base if base is not None else stored.base_path
    if name is None:
        raise DareError(
            "the adapter does not name its base model", where=str(stored.folder), fix="give it with --base (base=...)"
        )
    try:
        found = resolve_checkpoint(name)
    except DareError as error:
        raise DareError(
            "the adapter's base model is not found",
            where=str(stored.folder),
            got=f"{name}: {error.what}",
            fix="give the folder that holds it now with --base (base=...)",
        ) from None
    if is_adapter(found):
        raise DareError("the base of an adapter is a whole model", where=str(found), got="another adapter")
    return found


def _verify(stored: StoredAdapter, folder: Path) -> None:
    """The base's weights are those of the training, if the adapter says which these were."""
    if stored.base_digest is None:
        return
    digest = Shards(folder).digest()
    if digest != stored.base_digest:
        raise DareError(
            "the adapter was trained on other weights than those of this base",
            where=f"{stored.folder}, base {folder}",
            got=f"weights {digest[:12]}",
            expected=f"weights {stored.base_digest[:12]}",
            fix="give the base that it was trained on with --base (base=...)",
        )


def _rebased(stored: StoredAdapter, base: str | Path | None) -> Base | None:
    """The base as it was found, so that the adapter names it when it is saved again."""
    if base is None:
        return stored.base()
    path = Path(base).expanduser()
    return Base(str(path.resolve()) if path.is_dir() else str(base), stored.base_digest)
