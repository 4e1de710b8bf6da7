"""The page of a study: everything its template needs, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dare.core.secrets import hide_secrets
from dare.report.curves import Chart, Series
from dare.report.drawing import SMALL, Drawing, draw
from dare.report.templating import environment, points
from dare.studies.results import Missing, Result
from dare.studies.study import Plan
from dare.studies.summary import Row, Table, listed, overall
from dare.terminal.text import duration, percent

_MIN_PAIRS = 3
_SCALES = (0.05, 0.1, 0.2, 0.5)  # where the axis of a panel's solve rates may end, if not at 1


@dataclass(frozen=True)
class View:
    """A panel. `scale` is the solve rate at the end of the axis; `recipes` has (algorithm, resolved recipe)."""

    table: Table
    headlines: list[str]
    drawings: list[Drawing]
    scale: float
    recipes: list[tuple[str, str]]


def render_study(
    plan: Plan, results: Sequence[Result | Missing], tables: Sequence[Table], origin: dict[str, Any]
) -> str:
    """The self-contained HTML page."""
    study = plan.study
    num_missing = sum(isinstance(item, Missing) for item in results)
    pages = environment()
    pages.filters["duration"] = duration
    return pages.get_template("study.html.j2").render(
        study=study,
        facts=_facts(plan),
        num_runs=len(results),
        num_done=len(results) - num_missing,
        num_missing=num_missing,
        baseline=baseline_of(plan),
        views=[_view(plan, table, results) for table in tables],
        ranking=_ranking(tables),
        unit=study.budget.unit,
        tuned=listed(["the algorithm with its options", *study.tuned]),
        origin_words=_origin_words(origin),
    )


def _view(plan: Plan, table: Table, results: Sequence[Result | Missing]) -> View:
    highest = max([*(row.solve_rate.high for row in table.rows), table.start or 0.0])
    cells = [item.cell for item in results if item.cell.panel == table.panel]
    first = {cell.algorithm: cell for cell in reversed(cells)}
    return View(
        table=table,
        headlines=headlines(table, baseline_of(plan)),
        drawings=[draw(chart, SMALL) for chart in study_charts(table, plan.study.budget.unit)],
        scale=next((scale for scale in _SCALES if highest <= scale), 1.0),
        recipes=[
            (name, hide_secrets(first[name].recipe.dump_yaml()))
            for name in dict.fromkeys(cell.algorithm for cell in cells)
        ],
    )


def _ranking(tables: Sequence[Table]) -> list[tuple[str, list[tuple[float, float] | None], float]]:
    """(algorithm, its rank and mean solve rate in each table or None, mean rank), the best first."""
    rates = [{row.algorithm: row.solve_rate.mean for row in table.rows} for table in tables]
    return [
        (name, [None if rank is None else (rank, rates[i][name]) for i, rank in enumerate(places)], mean)
        for name, places, mean in overall(tables)
    ]


def baseline_of(plan: Plan) -> str:
    """The algorithm that the others are compared with."""
    return plan.study.baseline or next(iter(plan.study.algorithms))


def study_charts(table: Table, unit: str) -> list[Chart]:
    """One chart per algorithm: its own curve with its band, and the others in grey."""
    curves = {row.algorithm: _series(row) for row in table.rows}
    found = []
    for row in table.rows:
        others = [Series(name, s.steps, s.values, tone="quiet") for name, s in curves.items() if name != row.algorithm]
        found.append(Chart(row.algorithm, "percent", [*others, curves[row.algorithm]], x_name=unit))
    return found


def headlines(table: Table, baseline: str) -> list[str]:
    """What a panel shows, in a few plain sentences; nothing is claimed that an interval does not bear out."""
    if not table.rows:
        return []
    best = table.rows[0]
    start = "" if table.start is None else f", from {percent(table.start)} at the start"
    lines = [
        f"{best.algorithm} solves most, {percent(best.solve_rate.mean)} "
        f"({percent(best.solve_rate.low)} to {percent(best.solve_rate.high)}{start})."
    ]
    for row in table.rows:
        if row.comparison is not None and _is_significant(row):
            word = "more" if row.comparison.solve_rate.mean > 0 else "less"
            lines.append(
                f"{row.algorithm} solves {word} than {baseline}: {points(row.comparison.solve_rate.mean)} points, "
                f"p = {row.comparison.p:.3g}."
            )
    if len(table.rows) > 1 and not any(map(_is_significant, table.rows)):
        lines.append(f"No difference from {baseline} is significant at 5% with these seeds.")
    fallen = [row.algorithm for row in table.rows if table.start is not None and row.solve_rate.high < table.start]
    if fallen:
        lines.append(f"Below the start checkpoint, interval and all: {listed(fallen)}.")
    hidden = [row.algorithm for row in table.rows if _hides_failure(row)]
    if hidden:
        lines.append(f"The reward rose while the solve rate did not: {listed(hidden)}.")
    return lines


def _is_significant(row: Row) -> bool:
    """At 5 %, adjusted, and with enough seeds for that to mean something."""
    return row.comparison is not None and row.comparison.num_pairs >= _MIN_PAIRS and row.comparison.p <= 0.05


def _hides_failure(row: Row) -> bool:
    if len(row.curve) < 2:
        return False
    first, last = row.curve[0], row.curve[-1]
    return last.reward.mean > first.reward.mean + 0.01 and last.solve_rate.mean <= first.solve_rate.mean


def _series(row: Row) -> Series:
    return Series(
        label=row.algorithm,
        steps=[point.spent for point in row.curve],
        values=[point.solve_rate.mean for point in row.curve],
        low=[point.solve_rate.low for point in row.curve],
        high=[point.solve_rate.high for point in row.curve],
        is_points=True,
        tone="b",
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    study = plan.study
    return [
        ("budget of a run", f"{study.budget.amount:,.0f} {study.budget.unit}"),
        ("algorithms", str(len(study.algorithms))),
        ("families", ", ".join(study.families)),
        ("tasks", ", ".join(study.tasks)),
        ("seeds", ", ".join(map(str, study.seeds))),
    ]


def _origin_words(origin: dict[str, Any]) -> str:
    versions = [f"{name} {number}" for name, number in origin["versions"].items() if number]
    hardware, git = origin["hardware"], origin["git"]
    state = "" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['is_changed'] else ''}"
    machine = f"{hardware['num_cpus']} x {hardware['cpu']}, {hardware['memory_gib']} GiB, {hardware['system']}"
    return " · ".join(part for part in (*versions, f"Python {origin['python']}", state, machine) if part)
