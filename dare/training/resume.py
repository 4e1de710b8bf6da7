"""Where a run goes on: the folder is its own, the recipe is the same, the checkpoint is whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dare.core.errors import DareError
from dare.core.files import sync_directory
from dare.core.recipe import Recipe, read_recipe
from dare.core.secrets import hide_secrets
from dare.core.yaml_text import load_yaml
from dare.training.checkpoint import TrainerState, list_checkpoints, read_state

# newest: damage is an error; auto: pass over damaged checkpoints, as far back as the beginning
Resume = Literal["never", "newest", "auto"]
_DAMAGED = "damaged-"

_FREE_IN_TRAIN = ("steps", "micro_batch_views", "micro_batch_tokens", "pack_length", "recompute", "step_timeout_s")
_FREE_IN_ROLLOUT = (
    *("urls", "api_key_env", "weights_dir", "concurrency"),
    *("timeout_s", "deadline_s", "retries", "backoff_s", "max_gap"),
)
_MAY_CHANGE = (
    ("executor",),
    ("log",),
    ("checkpoint",),
    *(("train", key) for key in _FREE_IN_TRAIN),
    *(("rollout", key) for key in _FREE_IN_ROLLOUT),
)


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to continue from, None for the beginning, and what was passed over on the way to it."""

    path: Path | None
    state: TrainerState | None
    warnings: list[str] = field(default_factory=list)


def require_new_folder(run_dir: Path, resume: Resume) -> None:
    """Raises DareError for a folder that holds a run which is not to be continued."""
    if resume == "never":
        raise DareError(
            "the output folder already holds a run",
            where=str(run_dir),
            fix="continue it with --resume, or choose another --out",
        )


def check_same_recipe(path: Path, recipe: Recipe) -> None:
    """Raises DareError unless `recipe` is the one at `path`, but for secrets and what a resumed run may change."""
    changed = _differences(_fixed_part(read_recipe(path)), _fixed_part(load_yaml(hide_secrets(recipe.dump_yaml()))))
    if changed:
        raise DareError(
            "the recipe differs from the one that this run was started with",
            where=str(path),
            got="; ".join(changed),
            fix="resume with the same recipe, or start a new run with another --out",
        )


@contextmanager
def lock_folder(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock ends with it, however it ends. Raises DareError if it is taken.

    On a file system without locks of folders there is none.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DareError(
                "another process is writing this run",
                where=str(run_dir),
                fix="wait for it or stop it, or choose another --out",
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def choose_checkpoint(run_dir: Path, resume: Resume) -> Chosen:
    """The newest checkpoint of the run, for `auto` the newest whole one; damaged ones are renamed to damaged-NAME.

    Whole means: all files have their sizes, and the logs are at least as long as they were then. Raises DareError for
    a damaged checkpoint unless `auto`.
    """
    warnings = []
    for path in reversed(list_checkpoints(run_dir / "checkpoints")):
        try:
            state = read_state(path)
            _check_logs(run_dir, state)
        except DareError as error:
            if resume != "auto":
                raise
            aside = path.with_name(_DAMAGED + path.name)
            path.rename(aside)
            sync_directory(aside.parent)
            warnings.append(f"{path.name} is damaged, now {aside.name}: {str(error).replace(chr(10), ';')}")
            continue
        return Chosen(path, state, warnings)
    return Chosen(None, None, warnings)


def _check_logs(run_dir: Path, state: TrainerState) -> None:
    for name, size in state.log_bytes.items():
        log = run_dir / f"{name}.jsonl"
        have = log.stat().st_size if log.is_file() else 0
        if have < size:
            raise DareError(
                "the log is shorter than its checkpoint says", where=str(log), got=have, expected=f">= {size} bytes"
            )


def _fixed_part(recipe: dict[str, Any]) -> dict[str, Any]:
    """Flat dotted keys of everything that a resumed run may not change."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if path in _MAY_CHANGE:
            return
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        else:
            flat[".".join(path)] = node

    walk(recipe, ())
    return flat


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]
