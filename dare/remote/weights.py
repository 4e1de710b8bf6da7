"""Updated weights in a folder that trainer and servers see: written whole, one folder per version, old ones removed."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
from pathlib import Path

from dare.core.errors import DareError
from dare.core.files import whole_directory
from dare.families.base import Family
from dare.families.lora import merge_adapter
from dare.families.weights import save_family

_PREFIX = "weights-"


class WeightFolders:
    """Versions of the trained weights under `directory`; None: a temporary folder, gone at the end."""

    def __init__(self, directory: str | None) -> None:
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="dare-weights-")
        self.root = Path(directory) if directory else Path(self._temporary.name if self._temporary else "")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DareError(
                "the folder for updated weights cannot be made", where="rollout.weights_dir", got=str(error)
            ) from None

    def write(self, family: Family, version: int) -> tuple[Path, str]:
        """The folder with the family's weights, a whole model, and the label of this version.

        The label holds a digest of the weights, so that two runs which share a server notice each other.
        """
        folder = self.root / f"{_PREFIX}{version:06d}"
        with whole_directory(folder) as temporary:
            save_family(_whole(family), temporary)
        return folder, f"{version:06d}-{_digest(folder)}"

    def keep(self, folder: Path) -> None:
        """Remove all versions but one."""
        for old in self.root.glob(f"{_PREFIX}*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Remove the temporary folder; one that the recipe names keeps its last version, for servers that restart."""
        if self._temporary is not None:
            self._temporary.cleanup()


def _whole(family: Family) -> Family:
    """The family, or a copy of it with its adapter merged: servers know no adapters of ours."""
    if family.adapter is None:
        return family
    merged = copy.deepcopy(family)
    merge_adapter(merged)
    return merged


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest()
