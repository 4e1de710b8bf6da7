"""A study: algorithms x families x tasks x seeds under one budget, as one YAML file. No torch.

    budget: {completions: 40960}         what every run may spend; or forwards, or seconds
    families: {llada: {start: ../tiny/llada_sft.yaml, recipe: {decode: {block_length: 8}}}}
    tasks: {countdown: {recipe: {task: {name: countdown}}}}
    algorithms: {wd1: {}, espo: {recipe: {optimizer: {lr: 3.0e-4}}}}
    tuned: [optimizer.lr]                the keys in which algorithms may differ

A cell is one run. Its recipe is `recipe`, then that of its task, its family and its algorithm, merged in this order.
Cells of one family and task must agree in everything but the algorithm, the seed and what is declared as tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dare.core.checks import check, check_attention
from dare.core.errors import DareError
from dare.core.options import Options
from dare.core.recipe import Recipe, merge, parse_recipe, read_recipe
from dare.core.recipe_errors import explain
from dare.core.registry import FAMILIES, resolve
from dare.core.yaml_text import load_yaml

Unit = Literal["completions", "forwards", "seconds"]
_TUNABLE = ("optimizer", "train.updates_per_rollout")
_FREE = ("name", "seed", "algorithm", "train.steps", "evaluation.every")  # cells may differ here without saying so
START = "START"  # stands for the start checkpoint until it is known


class Budget(Options):
    """What every run may spend. Exactly one."""

    completions: int | None = Field(None, ge=1, description="sampled completions")
    forwards: int | None = Field(None, ge=1, description="network forwards of one sequence: denoising, scoring, replay")
    seconds: float | None = Field(None, gt=0, description="wall time of the steps")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.completions, self.forwards, self.seconds)) != 1:
            raise ValueError("give exactly one of completions, forwards and seconds")
        return self

    @property
    def unit(self) -> Unit:
        if self.completions is not None:
            return "completions"
        return "forwards" if self.forwards is not None else "seconds"

    @property
    def amount(self) -> float:
        return float(self.completions or self.forwards or self.seconds or 0)


class FamilyEntry(Options):
    """Where the runs of a family start, and what is particular to its models."""

    start: str = Field(description="recipe (YAML) that trains the start checkpoint of each task, or a checkpoint")
    recipe: dict[str, Any] = Field({}, description="sections of a recipe, for all its runs")
    start_recipe: dict[str, Any] = Field({}, description="sections of a recipe, for the start only")


class TaskEntry(Options):
    recipe: dict[str, Any] = Field(description="sections of a recipe with the task, for all its runs")


class AlgorithmEntry(Options):
    algorithm: dict[str, Any] | None = Field(None, description="name and options; default: the entry's name")
    recipe: dict[str, Any] = Field({}, description="what is tuned for it; the keys must be listed in `tuned`")


class Study(Options):
    """Everything that determines a comparison."""

    name: str = Field(min_length=1)
    budget: Budget
    seeds: list[int] = Field(min_length=1, description="of the runs; the start checkpoint has start_seed")
    start_seed: int = Field(0, ge=0)
    num_evaluations: int = Field(4, ge=1, description="points of a learning curve after the start")
    recipe: dict[str, Any] = Field({}, description="sections of a recipe, for all runs")
    families: dict[str, FamilyEntry] = Field(min_length=1)
    tasks: dict[str, TaskEntry] = Field(min_length=1)
    algorithms: dict[str, AlgorithmEntry] = Field(min_length=1)
    baseline: str | None = Field(None, description="algorithm that the others are compared with; default: the first")
    tuned: list[str] = Field([], description="keys below optimizer, or train.updates_per_rollout")

    @field_validator("families", "tasks", "algorithms", mode="before")
    @classmethod
    def _fill(cls, entries: Any) -> Any:
        """`wd1:` alone is an entry without settings."""
        return {k: {} if v is None else v for k, v in entries.items()} if isinstance(entries, dict) else entries

    @model_validator(mode="after")
    def _check(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are different numbers from 0, got {self.seeds}")
        if self.baseline is not None and self.baseline not in self.algorithms:
            raise ValueError(f"baseline {self.baseline!r} is none of the algorithms {', '.join(self.algorithms)}")
        for key in self.tuned:
            if not any(key == part or key.startswith(f"{part}.") for part in _TUNABLE):
                raise ValueError(f"{key} cannot be tuned per algorithm, only keys of {' and '.join(_TUNABLE)} can")
        for name in (*self.families, *self.tasks, *self.algorithms):
            if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
                raise ValueError(f"{name!r} names a folder: use letters, digits, '-', '_' and '.'")
        return self


@dataclass(frozen=True)
class Panel:
    """A family and a task: within it, algorithms are compared."""

    family: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.family}/{self.task}"


@dataclass(frozen=True)
class Cell:
    """One run. `recipe.model.path` is `START`, `recipe.train.steps` not yet that of the budget."""

    panel: Panel
    algorithm: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.panel.name}/{self.algorithm}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What a study runs. `impossible` maps (panel, algorithm) to the reason; `starts` the panels to start recipes."""

    study: Study
    cells: list[Cell]
    starts: dict[Panel, Recipe | Path]
    impossible: dict[tuple[Panel, str], str]

    @property
    def panels(self) -> list[Panel]:
        return list(self.starts)


def load_study(path: Path) -> Plan:
    """Read and check a study. Raises DareError for wrong keys, impossible recipes and unlike settings."""
    if not path.is_file():
        raise DareError(
            "study not found", where=str(path), fix="give a YAML file such as recipes/studies/tiny_zoo.yaml"
        )
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DareError("the study is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(data, dict):
        raise DareError("a study is a mapping of keys", where=str(path), got=type(data).__name__)
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise explain(error, Study, where=str(path), what="the study is") from None
    return make_plan(study, path)


def make_plan(study: Study, path: Path) -> Plan:
    """All cells of a study; `path` is its file, from which start recipes are found. Errors as in `load_study`."""
    cells, starts, impossible = [], {}, {}
    for family, family_entry in study.families.items():
        for task, task_entry in study.tasks.items():
            panel = Panel(family, task)
            starts[panel] = _start(study, panel, family_entry, task_entry, path)
            for name, entry in study.algorithms.items():
                algorithm = entry.algorithm or {"name": name}
                reason = _why_impossible(algorithm, starts[panel])
                if reason is not None:
                    impossible[panel, name] = reason
                    continue
                parts = (study.recipe, task_entry.recipe, family_entry.recipe, entry.recipe)
                for seed in study.seeds:
                    recipe = _cell_recipe(parts, algorithm, f"{study.name}: {panel.name}/{name}", seed, path)
                    cells.append(Cell(panel, name, seed, recipe))
    _check_alike(study, cells, path)
    if not cells:
        raise DareError("the study has no run that is possible", where=str(path), got="; ".join(impossible.values()))
    return Plan(study, cells, starts, impossible)


def fixed_settings(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys in which runs that are compared must agree, with their values."""
    flat = flatten(recipe.model_dump(mode="json"))
    return {
        key: value for key, value in flat.items() if not _is_under(key, (*_FREE, "model.path", "log", "checkpoint"))
    }


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _cell_recipe(
    parts: tuple[dict[str, Any], ...], algorithm: dict[str, Any], name: str, seed: int, path: Path
) -> Recipe:
    data: dict[str, Any] = {"name": name, "seed": seed, "model": {"path": START}, "algorithm": algorithm}
    for part in parts:
        data = merge(data, part)
    where = f"{path}, {name}"
    if data["model"].get("path") != START or data["seed"] != seed or data["algorithm"] != algorithm:
        raise DareError("a study sets model.path, seed and algorithm itself", where=where, fix="remove them")
    recipe = parse_recipe(data, where=where)
    if recipe.algorithm.type.kind != "online":
        raise DareError(
            "a study compares algorithms that learn from rewards", where=where, got=f"algorithm {recipe.algorithm.name}"
        )
    try:
        check(recipe)
    except DareError as error:
        raise error.inside(where) from None
    return recipe


def _start(study: Study, panel: Panel, family: FamilyEntry, task: TaskEntry, path: Path) -> Recipe | Path:
    """The recipe that trains the panel's start, or the checkpoint that is there already."""
    if not family.start.endswith((".yaml", ".yml")):
        found = Path(family.start)
        return found if found.exists() or not (path.parent / found).exists() else path.parent / found
    data = read_recipe(path.parent / family.start)
    shared = {key: value for key, value in merge(study.recipe, task.recipe).items() if key in ("task", "decode")}
    shared = merge(shared, {key: value for key, value in family.recipe.items() if key in ("decode", "task")})
    for part in (
        shared,
        family.start_recipe,
        {"name": f"{study.name}: start of {panel.name}", "seed": study.start_seed},
    ):
        data = merge(data, part)
    recipe = parse_recipe(data, where=f"{path}, start of {panel.name}")
    check(recipe)
    return recipe


def _why_impossible(algorithm: dict[str, Any], start: Recipe | Path) -> str | None:
    """Why the algorithm cannot train this kind of model; None if it can, or if the kind is not known yet."""
    created = start.model.create if isinstance(start, Recipe) else None
    row = FAMILIES.get(created.family) if created is not None else None
    if row is None or row.attention is None:
        return None
    name = str(algorithm.get("name"))
    kind = resolve("algorithms", name)
    try:
        check_attention(name, kind, row.attention)
    except DareError as error:
        return error.what
    return None


def _check_alike(study: Study, cells: list[Cell], path: Path) -> None:
    """Raise DareError if cells that will be compared differ in anything that is not declared."""
    first: dict[Panel, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.panel, cell)
        mine, theirs = fixed_settings(cell.recipe), fixed_settings(other.recipe)
        unlike = [
            f"{key}: {theirs.get(key)!r} for {other.algorithm}, {mine.get(key)!r} for {cell.algorithm}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key) and not _is_under(key, study.tuned)
        ]
        if unlike:
            raise DareError(
                "the study mixes unlike settings",
                where=f"{path}, {cell.panel.name}",
                got="; ".join(unlike),
                fix="set them for all under recipe, or list what was tuned (optimizer settings) under tuned",
            )


def _is_under(key: str, parts: Any) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)
