"""A run folder as data, finished or not, with a list of what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dare.core.errors import DareError
from dare.core.files import read_json, read_lines

Record = dict[str, Any]


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
        steps = self.recipe.get("train", {}).get("steps")
        return None if steps is None else int(steps)

    @property
    def missing(self) -> list[str]:
        """What is not there (yet), in plain words."""
        notes = []
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
    """Read a run folder. Raises DareError if it is none, or if a file in it is malformed."""
    recipe_file = path / "recipe.yaml"
    if not recipe_file.is_file() and not (path / "metrics.jsonl").is_file():
        raise DareError(
            "not a run folder", where=str(path), expected="recipe.yaml and metrics.jsonl, as `dare train` writes"
        )
    recipe_text = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else ""
    info_file = path / "run.json"
    logs = {name: _read_log(path / f"{name}.jsonl") for name in ("metrics", "timing", "eval", "validation", "samples")}
    return RunData(
        path=path,
        recipe=_parse_recipe(recipe_text, recipe_file),
        recipe_text=recipe_text,
        info=read_json(info_file, "run status") if info_file.is_file() else {},
        metrics=logs["metrics"],
        timing=logs["timing"],
        evaluations=logs["eval"],
        validations=logs["validation"],
        samples=logs["samples"],
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


def _read_log(path: Path) -> list[Record]:
    try:
        return read_lines(path)
    except (TypeError, ValueError) as error:
        raise DareError("the log has a line that is not a JSON object", where=str(path), got=str(error)) from None


def _parse_recipe(text: str, path: Path) -> Record:
    try:
        recipe = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise DareError("the recipe is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(recipe, dict):
        raise DareError("a recipe is a mapping of keys", where=str(path), got=type(recipe).__name__)
    return recipe
