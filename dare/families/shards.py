"""The safetensors files of a checkpoint folder, read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dare.core.errors import DareError
from dare.core.files import read_json

WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Shards:
    """Names, shapes and dtypes of all tensors in a folder, from the files' headers; nothing else is read yet.

    Raises DareError if there are no weights, a shard is missing, truncated or corrupt, a tensor is stored twice
    or is not in a floating-point format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = _find(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._names: dict[Path, list[str]] = {}
        for path in self.paths:
            self._read_header(path)

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names (None: all) with their names, on the CPU; one at a time is in memory."""
        for path, stored in self._names.items():
            wanted = stored if names is None else [name for name in stored if name in names]
            if wanted:
                with _open(path) as file:
                    for name in wanted:
                        yield name, file.get_tensor(name)

    def digest(self) -> str:
        """SHA-256 of every tensor's name, format, shape and bytes; how they are shared out among files is no part."""
        parts = {}
        for name, tensor in self.tensors():
            content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            parts[name] = content.hexdigest()
        return hashlib.sha256("".join(f"{name} {parts[name]}\n" for name in sorted(parts)).encode()).hexdigest()

    def _read_header(self, path: Path) -> None:
        with _open(path) as file:
            self._names[path] = list(file.keys())
            for name in self._names[path]:
                part = file.get_slice(name)
                stored = part.get_dtype()
                if name in self.shapes:
                    raise DareError("a tensor is stored in two shards", where=str(path), got=name)
                if stored not in _DTYPES:
                    raise DareError(
                        f"the tensor {name} is stored in a format that is not supported",
                        where=str(path),
                        got=stored,
                        expected=", ".join(_DTYPES),
                        fix="use the unquantised checkpoint",
                    )
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES[stored]


def _find(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one, or those that its index names."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index_path = folder / _INDEX_NAME
    if index_path.is_file():
        return _indexed(folder, index_path)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise DareError(
            "the checkpoint is stored as pickles, which run code when loaded, so they are refused",
            where=str(folder),
            got=", ".join(pickles[:5]),
            expected=WEIGHTS_NAME,
            fix="convert the checkpoint to safetensors",
        )
    unlisted = sorted(path.name for path in folder.glob("*.safetensors"))
    raise DareError(
        "the folder holds no weights" if not unlisted else "the index of the weight shards is missing",
        where=str(folder),
        got=", ".join(unlisted[:5]) or None,
        expected=f"{WEIGHTS_NAME} or {_INDEX_NAME}",
        fix="copy or download the checkpoint again",
    )


def _indexed(folder: Path, index_path: Path) -> list[Path]:
    index = read_json(index_path, "index of the weight shards")
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise DareError("the index names no shards", where=str(index_path), expected='"weight_map": {tensor: file}')
    shards = sorted(set(names.values()))
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise DareError("the index names a file outside its folder", where=str(index_path), got=outside[0])
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise DareError(
            f"{len(missing)} of {len(shards)} weight shards are missing",
            where=str(folder),
            got=f"no file {', '.join(missing[:5])}",
            fix="copy or download the checkpoint again",
        )
    return [folder / name for name in shards]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise DareError(
            "the weights are truncated or not a safetensors file",
            where=str(path),
            got=f"{path.stat().st_size} bytes; {error}",
            fix="copy or download the file again",
        ) from None
