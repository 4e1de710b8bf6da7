"""Reference curves: what a shipped recipe reached when it was measured, to hold a run of it against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dare.core.errors import DareError
from dare.core.files import read_json
from dare.core.recipe import parse_recipe
from dare.report.run_data import Record, RunData

_COMPARED = ("algorithm", "task", "decode")
_FOLDER = Path("benchmarks") / "results" / "reference"


@dataclass(frozen=True)
class Reference:
    """`label` says what it is in words; `evaluations` are records as in eval.jsonl."""

    label: str
    evaluations: list[Record]


def find_reference(run: RunData, path: Path | None = None) -> Reference | None:
    """The reference of the run's recipe: the file `path`, or the one shipped under the recipe's name, or None.

    A shipped reference counts only if algorithm, task and decode options are the run's own. Raises DareError if a file
    that was named is no reference.
    """
    if path is not None:
        return _read(path)
    for root in (Path(), Path(__file__).parents[2]):
        shipped = root / _FOLDER / f"{run.name}.json"
        if shipped.is_file():
            try:
                record = json.loads(shipped.read_text(encoding="utf-8"))
            except ValueError:
                return None
            return _read(shipped) if _settings(record) == _settings(run.recipe) else None
    return None


def _settings(record: Record) -> Record:
    """What must be equal, with the defaults of options that are newer than the record."""
    found = {key: record[key] for key in _COMPARED if record.get(key) is not None}
    try:
        recipe = parse_recipe({"name": "compared", "model": {"path": "-"}, **found}, where="reference")
    except DareError:
        return found
    return recipe.model_dump(mode="json", include=set(_COMPARED))


def _read(path: Path) -> Reference:
    record = read_json(path, "reference")
    evaluations = record.get("evaluations") if isinstance(record, dict) else None
    if not isinstance(evaluations, list) or not all(isinstance(e, dict) and "step" in e for e in evaluations):
        raise DareError(
            "not a reference",
            where=str(path),
            expected='{"label": TEXT, "evaluations": [{"step": 0, "solve_rate": 0.1}, ...]}',
        )
    return Reference(str(record.get("label", path.stem)), evaluations)
