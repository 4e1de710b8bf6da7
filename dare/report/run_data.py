"""A run folder as data, finished or not, with a list of what it lacks."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dare.core.errors import DareError
from dare.core.files import complete_lines
from dare.core.secrets import hide_secrets
from dare.core.yaml_text import load_yaml

Record = dict[str, Any]

_PACKAGE = "dare-dllm"
_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, Any]] = {
    "metrics": {"step": int},
    "timing": {"step": int},
    "validation": {"step": int},
    "eval": {
        "step": int,
        "task": str,
        "split": str,
        "num": int,
        "num_solved": int,
        "solve_rate": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
    },
    "samples": {
        "step": int,
        "uid": str,
        "prompt": str,
        "completion": str,
    },
}
_TEXTS = ("task", "split", "uid", "prompt", "completion", "reference", "finish", "status", "name", "error")
_LISTS = ("tokens", "step_map", "logp", "block")
_MAPPINGS = ("decode", "parts", "versions", "machine")
_SECTIONS = ("model", "algorithm", "task", "decode", "train", "optimizer", "evaluation", "checkpoint", "log", "data")


@dataclass(frozen=True)
class RunData:
    """The logs of one run; every list may be empty."""

    path: Path
    recipe: Record
    recipe_text: str
    info: Record  # run.json
    metrics: list[Record]
    timing: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    traces: list[Path] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # what is there and could not be read, in plain words
    validations: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.recipe.get("name") or self.path.name)

    @property
    def algorithm(self) -> str:
        return str(self.recipe.get("algorithm", {}).get("name", "?"))

    @property
    def status(self) -> str:
        return str(self.info.get("status", "unknown"))

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def num_steps(self) -> int | None:
        """Steps the recipe asks for."""
        steps = self.setting("train", "steps")
        return None if steps is None else int(steps)

    def setting(self, section: str, key: str) -> float | None:
        """A number of the recipe; None if it has none there."""
        value = self.recipe.get(section, {}).get(key)
        return float(value) if _is_number(value) else None

    @property
    def missing(self) -> list[str]:
        """What is not there (yet), in plain words."""
        notes = list(self.unread)
        if not self.recipe:
            notes.append("recipe.yaml is missing, so the settings are not known")
        if not self.info:
            notes.append("run.json is missing, so it is not known whether the run has ended")
        elif self.status != "finished":
            of = f" of {self.num_steps}" if self.num_steps else ""
            reason = f": {self.info['error']}" if self.info.get("error") else ""
            verb = "still running:" if self.status == "running" else f"{self.status} at"
            notes.append(f"the run is {verb} step {self.last_step}{of}{reason}")
        if not self.metrics:
            notes.append("there is no training step yet")
        if not self.evaluations:
            notes.append("there is no held-out evaluation, so there is no solve rate to compare")
        elif len(self.evaluations) == 1:
            notes.append("there is only one held-out evaluation, so there is no before and after")
        if not self.samples:
            notes.append("there are no sample completions")
        return notes


def load_run(path: Path) -> RunData:
    """Read a run folder as far as it can be read; `RunData.unread` says what could not.

    Raises DareError only if it is no run folder at all.
    """
    recipe_file = path / "recipe.yaml"
    if not recipe_file.is_file() and not (path / "metrics.jsonl").is_file():
        raise DareError(
            "not a run folder", where=str(path), expected="recipe.yaml and metrics.jsonl, as `dare train` writes"
        )
    unread: list[str] = []
    recipe_text = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else ""
    logs = {name: _read_log(path / f"{name}.jsonl", needed, unread) for name, needed in _NEEDED.items()}
    return RunData(
        path=path,
        recipe=_parse_recipe(recipe_text, unread),
        recipe_text=recipe_text,
        info=_read_info(path / "run.json", unread),
        metrics=logs["metrics"],
        timing=logs["timing"],
        evaluations=logs["eval"],
        validations=logs["validation"],
        samples=logs["samples"],
        traces=sorted((path / "traces").glob("*.safetensors")),
        unread=unread,
    )


def earlier_stage(run: RunData) -> Path | None:
    """The run that this run's model came from: `model.path` is that run's folder or one of its checkpoints."""
    model_path = run.recipe.get("model", {}).get("path")
    if model_path is None:
        return None
    model = Path(str(model_path))
    run_dir = model.parent.parent if model.parent.name == "checkpoints" else model
    # A relative path was relative to where the run was started; a sibling of the run folder is found from anywhere.
    for candidate in (run_dir, run.path.resolve().parent / run_dir.name):
        if (candidate / "recipe.yaml").is_file() and candidate.resolve() != run.path.resolve():
            return candidate
    return None


def _read_log(path: Path, needed: dict[str, Any], unread: list[str]) -> list[Record]:
    """The records that hold what every reader needs, in order; how many do not is noted."""
    records, num_bad = [], 0
    for line in complete_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            num_bad += 1
            continue
        # Metrics may be NaN: charts leave such steps out and say how many.
        record = _understood(record, may_be_nan=path.stem == "metrics") if isinstance(record, dict) else {}
        if all(isinstance(record.get(key), kind) for key, kind in needed.items()):
            records.append(record)
        else:
            num_bad += 1
    if num_bad:
        lines = "1 line" if num_bad == 1 else f"{num_bad} lines"
        unread.append(f"{lines} of {path.name} cannot be read (damaged, or of another version) and are left out")
    return records


def _understood(record: Record, *, may_be_nan: bool = False) -> Record:
    """What readers know how to show: texts, numbers and lists where they belong, and numbers under any other name."""
    return {key: value for key, value in record.items() if _is_known(key, value, may_be_nan)}


def _is_known(key: str, value: Any, may_be_nan: bool) -> bool:
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _LISTS:
        kinds: Any = {"tokens": str, "logp": (*_NUMBER, type(None))}.get(key, int)
        return isinstance(value, list) and all(isinstance(item, kinds) for item in value)
    if key in _MAPPINGS:
        is_numeric = key != "parts" or (isinstance(value, dict) and all(map(_is_number, value.values())))
        return isinstance(value, dict) and is_numeric
    if key == "is_solved":
        return isinstance(value, bool)
    return _is_number(value) or (may_be_nan and isinstance(value, float))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_info(path: Path, unread: list[str]) -> Record:
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        unread.append("run.json cannot be read")
        return {}
    info = _understood(info)
    writer, reader = str(info.get("versions", {}).get(_PACKAGE, "")), version(_PACKAGE)
    if _parts(writer) > _parts(reader):
        unread.append(
            f"the run was written by DARE {writer}, which is newer than this one ({reader}): some of it may be left out"
        )
    return info


def _parts(version_text: str) -> list[int]:
    """The numbers of a version, so that versions can be compared; what follows them is ignored."""
    release = re.match(r"\d+(\.\d+)*", version_text)
    return [int(part) for part in release[0].split(".")] if release else []


def _parse_recipe(text: str, unread: list[str]) -> Record:
    try:
        recipe = load_yaml(hide_secrets(text)) or {}
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict):
        unread.append("recipe.yaml is not a recipe, so the settings are not known")
        return {}
    sections = {key: value for key, value in recipe.items() if key not in _SECTIONS or isinstance(value, dict)}
    wrong = [key for key, value in recipe.items() if key not in sections and value is not None]
    if wrong:
        unread.append(f"recipe.yaml: {', '.join(wrong)} cannot be read")
    return sections
