"""The mean of several checkpoints of one model: often better than each of them, at no cost when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dare.core.errors import DareError
from dare.families.base import Family
from dare.families.shards import Shards
from dare.families.weights import load_family


def average_checkpoints(folders: Sequence[Path]) -> Family:
    """The family of the first folder with the mean of all weights, summed in float32, in its own dtype.

    Memory: the weights in float32 and one tensor. Buffers (routing biases) are averaged too. Raises DareError for fewer
    than two folders, for one that is given twice, or one whose tensors are not those of the first.
    """
    _check_folders(folders)
    family = load_family(folders[0])
    dtype = family.dtype
    family.to(dtype=torch.float32)
    target = family.network.state_dict()  # shares memory with the parameters
    for folder in folders[1:]:
        shards = Shards(folder)
        expected = {name: tuple(tensor.shape) for name, tensor in target.items()}
        if shards.shapes != expected:
            others = sorted(name for name, _ in shards.shapes.items() ^ expected.items())
            raise DareError(
                "checkpoints of different models have no average",
                where=str(folder),
                got=f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''} differ",
                expected=f"the tensors of {folders[0]}",
            )
        for name, tensor in shards.tensors():
            target[name] += tensor.float()
    for tensor in target.values():
        tensor /= len(folders)
    return family.to(dtype=dtype)


def _check_folders(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise DareError(
            "an average needs at least two checkpoints",
            got=", ".join(str(folder) for folder in folders) or "none",
            fix="name several, or a run that kept several (checkpoint.keep_last)",
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DareError("a checkpoint is named twice", got=", ".join(str(folder) for folder in folders))
