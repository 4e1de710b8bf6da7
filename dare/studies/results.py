"""What the runs of a study reached and what they cost, read back from their own logs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.report.run_data import Record, RunData, load_run
from dare.studies.study import Cell, Unit


@dataclass(frozen=True)
class Costs:
    """Totals of a run's steps; memory is the peak of the process in MiB. Evaluations are not counted."""

    completions: float
    forwards: float
    tokens: float
    seconds: float
    memory_mb: float


@dataclass(frozen=True)
class Point:
    """One held-out evaluation and what had been spent by then, in units of the budget."""

    step: int
    spent: float
    solve_rate: float
    reward: float


@dataclass(frozen=True)
class Result:
    """One finished cell. `curve` begins with the start checkpoint."""

    cell: Cell
    curve: list[Point]
    costs: Costs
    info: Record  # run.json

    @property
    def last(self) -> Point:
        return self.curve[-1]


@dataclass(frozen=True)
class Missing:
    """A cell without a result, and why."""

    cell: Cell
    reason: str


def read_cell(cell: Cell, folder: Path, unit: Unit) -> Result | Missing:
    """The result of a cell; what is missing if it has not finished."""
    if not (folder / "recipe.yaml").is_file():
        return Missing(cell, "not run yet")
    run = load_run(folder)
    if run.status != "finished":
        error = f": {run.info['error']}" if run.info.get("error") else ""
        return Missing(cell, f"{run.status} at step {run.last_step} of {cell.recipe.train.steps}{error}")
    evaluations = [e for e in run.evaluations if "reward_mean" in e]
    if not evaluations or evaluations[-1]["step"] != cell.recipe.train.steps:
        return Missing(cell, "; ".join(run.unread) or "there is no evaluation of its last step")
    spent = dict(zip((int(r["step"]) for r in run.metrics), accumulate(_per_step(run, cell.recipe, unit)), strict=True))
    curve = [
        Point(int(e["step"]), spent.get(int(e["step"]), 0.0), float(e["solve_rate"]), float(e["reward_mean"]))
        for e in evaluations
    ]
    return Result(cell, curve, _costs(run, cell.recipe), run.info)


def step_cost(folder: Path, recipe: Recipe, unit: Unit) -> float:
    """The mean cost of the steps of a pilot, the first one left out. Raises DareError if its log lacks them."""
    costs = _per_step(load_run(folder), recipe, unit)[1:]
    if not costs:
        raise DareError(
            "the log of a pilot lacks its steps", where=str(folder), fix="remove the folder; it is run again"
        )
    return sum(costs) / len(costs)


def _per_step(run: RunData, recipe: Recipe, unit: Unit) -> list[float]:
    num = recipe.train.prompts_per_step * recipe.train.completions_per_prompt
    if unit == "completions":
        return [float(num)] * len(run.metrics)
    if unit == "seconds":
        seconds = {int(record["step"]): float(record.get("seconds", 0.0)) for record in run.timing}
        return [seconds.get(int(record["step"]), 0.0) for record in run.metrics]
    num_updates = recipe.train.updates_per_rollout
    return [_number(r, "nfe") * num + _number(r, "view_forwards") * num_updates for r in run.metrics]


def _costs(run: RunData, recipe: Recipe) -> Costs:
    num = recipe.train.prompts_per_step * recipe.train.completions_per_prompt
    return Costs(
        completions=sum(_per_step(run, recipe, "completions")),
        forwards=sum(_per_step(run, recipe, "forwards")),
        tokens=sum(_number(record, "completion_length") * num for record in run.metrics),
        seconds=sum(_per_step(run, recipe, "seconds")),
        memory_mb=max((_number(record, "peak_memory_mb") for record in run.timing), default=0.0),
    )


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0
