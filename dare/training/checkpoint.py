"""Checkpoints: a HF-layout folder that anything can load, plus `trainer/` for an exact resume.

    checkpoints/step-000100/        the newest few; `best/` beside them is that of the lowest validation loss
      config.json  model.safetensors  tokenizer files
      trainer/optimizer.safetensors   moments, step count, fp32 masters of low-precision weights
      trainer/ahead.safetensors       the next rollout, of a run that makes it a step ahead
      trainer/state.json              step, seed, byte length of every log, size of every file here

Randomness and the position in the data are functions of (seed, step), so the step is all there is to store.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, ValidationError

from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.files import read_json, whole_directory, write_json
from dare.core.options import Options
from dare.core.recipe_errors import explain

_FORMAT = 1
BEST_NAME = "best"


class _StoredState(Options):
    """trainer/state.json."""

    format: int
    step: int = Field(ge=0)
    seed: int = Field(ge=0)
    log_bytes: dict[str, NonNegativeInt]
    files: dict[str, NonNegativeInt]


@dataclass(frozen=True)
class TrainerState:
    """`step` steps are done; `log_bytes` is how long each log was then."""

    step: int
    seed: int
    log_bytes: dict[str, int]


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    directory: Path,
    engine: Engine,
    tokenizer: Any,
    state: TrainerState,
    keep_last: int,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write `directory/step-NNNNNN` atomically, then delete all but the newest `keep_last` checkpoints."""
    target = directory / checkpoint_name(state.step)
    write_checkpoint(target, engine, tokenizer, state, write_more)
    for old in list_checkpoints(directory)[:-keep_last]:
        shutil.rmtree(old)
    return target


def write_checkpoint(
    target: Path,
    engine: Engine,
    tokenizer: Any,
    state: TrainerState,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write one checkpoint atomically; one that was there stays until the new one is whole.

    write_more  adds files to the folder that it is given, before sizes are taken
    """
    with whole_directory(target) as temporary:
        (temporary / "trainer").mkdir()
        engine.save(temporary)
        if write_more is not None:
            write_more(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
        write_json(
            temporary / "trainer" / "state.json",
            {"format": _FORMAT, "step": state.step, "seed": state.seed, "log_bytes": state.log_bytes, "files": sizes},
        )


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_state(checkpoint: Path) -> TrainerState:
    """The trainer state of a checkpoint, after checking that every file has the size it was written with.

    Raises DareError for a checkpoint that has no trainer state, is truncated or is from another version.
    """
    path = checkpoint / "trainer" / "state.json"
    if not path.is_file():
        raise DareError(
            "this checkpoint cannot be resumed: it holds weights but no trainer state",
            where=str(checkpoint),
            fix="start a new run from it with model.path",
        )
    data = read_json(path, "trainer state")
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise DareError("the trainer state has an unknown format", where=str(path), got=got, expected=_FORMAT)
    try:
        stored = _StoredState.model_validate(data)
    except ValidationError as error:
        raise explain(error, _StoredState, where=str(path), what="the trainer state is") from None
    for name, size in stored.files.items():
        file = checkpoint / name
        have = file.stat().st_size if file.is_file() else "no file"
        if have != size:
            raise DareError("the checkpoint is damaged", where=str(file), got=have, expected=f"{size} bytes")
    return TrainerState(step=stored.step, seed=stored.seed, log_bytes=stored.log_bytes)


def resolve_model_path(path: str) -> str:
    """The checkpoint that `path` means: a run folder stands for its newest checkpoint, anything else for itself."""
    checkpoints = Path(path) / "checkpoints"
    if not checkpoints.is_dir():
        return path
    found = list_checkpoints(checkpoints)
    if not found:
        raise DareError(
            "the run has no checkpoint yet", where=path, fix="wait for its first save, or set checkpoint.every"
        )
    return str(found[-1])
