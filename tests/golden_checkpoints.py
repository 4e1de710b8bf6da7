"""The small published-format checkpoints with known numbers, loaded the way a user would."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dare.families.base import Family
from dare.families.weights import load_family

GOLDEN = Path(__file__).parent / "golden"
MASK_ID = 126  # of every golden vocabulary; published LLaDA2.x configs do not name theirs


def copy_checkpoint(name: str, target: Path) -> Path:
    """A folder with what a checkpoint has (the golden folders also hold results) and a mask token in its config."""
    target.mkdir(exist_ok=True)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    if "mask_token_id" not in config:
        config["mask_token_id"] = MASK_ID
    (target / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(GOLDEN / name / "model.safetensors", target / "model.safetensors")
    return target


def load_golden(name: str) -> Family:
    with tempfile.TemporaryDirectory() as folder:
        return load_family(copy_checkpoint(name, Path(folder)))


@cache
def golden_family(name: str) -> Family:
    """Shared between tests, which must not change it."""
    return load_golden(name)


@cache
def _tensors(name: str, kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDEN / name / f"{kind}.safetensors")
    return tensors


@cache
def _cases(name: str, kind: str) -> dict[str, Any]:
    cases: dict[str, Any] = json.loads((GOLDEN / name / f"{kind}.json").read_text())
    return cases


def golden_case(name: str, kind: str, label: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one stored case."""
    prefix = f"{label}/"
    tensors = {key.removeprefix(prefix): value for key, value in _tensors(name, kind).items() if key.startswith(prefix)}
    return _cases(name, kind)[label], tensors
