"""Before and after: held-out evaluations side by side, and the interval of their difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dare.report.run_data import Record, RunData


@dataclass(frozen=True)
class Row:
    """One evaluation. `label` says of what; rates are shares in [0, 1]."""

    label: str
    evaluation: Record

    def get(self, name: str) -> float | None:
        """A number of the evaluation; None where it was not recorded."""
        value = self.evaluation.get(name)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Change:
    """After minus before, with its 95% interval; all three are shares in [-1, 1]."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Whether the interval does not tell better from worse."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """`differing` lists settings in which before and after differ; then `change` is None."""

    rows: list[Row]
    change: Change | None
    differing: list[str]


def compare(run: RunData, baseline: RunData | None) -> Comparison:
    """The first and the last evaluation of a run, and the last one of the baseline if there is one.

    Before is the run's own evaluation at step 0; without one it is the baseline's last evaluation. Nothing is
    selected by its result.
    """
    rows = []
    if baseline is not None and baseline.evaluations:
        last = baseline.evaluations[-1]
        rows.append(Row(f"{baseline.name}, step {last['step']}", last))
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        if first["step"] == 0 or first is not last:
            rows.append(Row(f"before: step {first['step']}", first))
        if first is not last or first["step"] > 0:
            rows.append(Row(f"{'after' if run.status == 'finished' else 'so far'}: step {last['step']}", last))
    if len(rows) < 2:
        return Comparison(rows, None, [])
    before, after = rows[-2].evaluation, rows[-1].evaluation
    differing = _differing(before, after)
    return Comparison(rows, None if differing else difference(before, after), differing)


def difference(before: Record, after: Record) -> Change:
    """The difference of two solve rates with its 95% interval from their Wilson intervals.

    Newcombe 1998, method 10, for independent samples; both evaluations use the same problems, so it errs on
    the wide side.
    """
    value = after["solve_rate"] - before["solve_rate"]
    low = value - math.hypot(after["solve_rate"] - after["low"], before["high"] - before["solve_rate"])
    high = value + math.hypot(after["high"] - after["solve_rate"], before["solve_rate"] - before["low"])
    return Change(value, low, high)


def _differing(before: Record, after: Record) -> list[str]:
    def settings(evaluation: Record) -> dict[str, Any]:
        decode = {f"decode.{key}": value for key, value in evaluation.get("decode", {}).items()}
        decode.pop("decode.batch_size", None)  # never changes a completion
        return {**{key: evaluation.get(key) for key in ("task", "split", "num")}, **decode}

    first, second = settings(before), settings(after)
    keys = [*first, *(key for key in second if key not in first)]
    return [f"{key}: {first.get(key)} → {second.get(key)}" for key in keys if first.get(key) != second.get(key)]
