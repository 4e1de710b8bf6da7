"""Presets: which benchmarks to run, and how, as YAML tables.

table   one task definition for all models; a sampler per family
paper   each model as its authors ran it, with the published score and its source
FILE    a table of one's own, of the form of table.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dare.core.errors import DareError, unknown_name
from dare.core.recipe_errors import explain
from dare.core.yaml_text import load_yaml
from dare.evals.suite import Settings

_FOLDER = Path(__file__).parent
_FACTS = ("published", "note")


@dataclass(frozen=True)
class Planned:
    """One benchmark to run. `facts` go into its result card."""

    task: str
    settings: Settings
    facts: dict[str, Any] = field(default_factory=dict)


def plan(
    preset: str | None,
    tasks: Sequence[str],
    *,
    family: str,
    checkpoint: str,
    model: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[Planned]:
    """What to run, in order.

    preset      table, paper, a YAML file, or None for the defaults of `Settings`
    tasks       names; empty: all of the preset
    family      of the checkpoint: chooses the sampler (table) and is checked (paper)
    model       paper: the published model that the checkpoint is; default: by the checkpoint's name
    overrides   settings by dotted name, applied last: gen_length (of decode), task.num_shots, likelihood.num_samples
    Raises DareError for unknown names, a preset of another family, and settings that cannot be.
    """
    if preset is None and not tasks:
        raise DareError("there is nothing to evaluate on", fix="give --tasks or --preset")
    if preset is None:
        rows: dict[str, dict[str, Any]] = {task: {} for task in tasks}
        common: dict[str, Any] = {}
    elif preset == "paper":
        rows, common = _paper(family, checkpoint, model)
    else:
        rows, common = _table(preset, family)
    for task in tasks:
        if task not in rows:
            raise unknown_name(f"task of preset {preset}", task, rows, where="--tasks")
    return [_planned(task, rows[task], common, preset, overrides or {}) for task in tasks or rows]


def published_models() -> dict[str, dict[str, Any]]:
    """The table of preset paper: by model, its family, source, style, and tasks with settings and published scores."""
    models: dict[str, dict[str, Any]] = _read(_FOLDER / "paper.yaml", "paper")["models"]
    return models


def _table(preset: str, family: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    data = _read(_FOLDER / "table.yaml" if preset == "table" else Path(preset), preset)
    tasks, samplers = data.get("tasks"), data.get("samplers") or {}
    if not isinstance(tasks, dict) or not isinstance(samplers, dict):
        raise DareError("a preset has mappings tasks and samplers", where=preset)
    if samplers and family not in samplers:
        raise DareError(
            "the preset has no sampler for this family", where=preset, got=family, expected=", ".join(samplers)
        )
    return {task: dict(row or {}) for task, row in tasks.items()}, {"decode": samplers.get(family, {})}


def _paper(family: str, checkpoint: str, model: str | None) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    models = published_models()
    name = model or Path(checkpoint).name
    if name not in models:
        error = unknown_name("published model", name, models, where="--model" if model else "the checkpoint's name")
        error.details["fix"] = error.details["fix"] or "say which published model this is with --model"
        raise error
    entry = models[name]
    if entry["family"] != family:
        raise DareError(
            f"the preset of {name} is for another family",
            where="--preset paper",
            got=f"a checkpoint of the family {family}",
            expected=entry["family"],
        )
    return entry["tasks"], {"style": entry["style"], "facts": {"model": name, "source": entry["source"]}}


def _planned(
    task: str, row: dict[str, Any], common: dict[str, Any], preset: str | None, overrides: dict[str, Any]
) -> Planned:
    facts = {**common.get("facts", {}), **{name: row[name] for name in _FACTS if name in row}}
    data: dict[str, Any] = {name: value for name, value in row.items() if name not in _FACTS}
    data["decode"] = {**common.get("decode", {}), **data.get("decode", {})}
    if "style" in common:
        data["style"] = common["style"]
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        if section == "task":
            data[name] = value
        elif section == "likelihood":
            data["likelihood"] = {**data.get("likelihood", {}), name: value}
        else:
            data["decode"] = {**data["decode"], key.removeprefix("decode."): value}
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise explain(error, Settings, where=f"evaluation of {task}", what="the settings are") from None
    if preset is not None:
        facts = {"preset": preset, **facts, **({"overridden": sorted(overrides)} if overrides else {})}
    return Planned(task, settings, facts)


def _read(path: Path, preset: str) -> dict[str, Any]:
    if not path.is_file():
        raise unknown_name("preset", preset, ("paper", "table"), where="--preset")
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DareError("the preset is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(data, dict):
        raise DareError("a preset is a mapping", where=str(path), got=type(data).__name__)
    return data
