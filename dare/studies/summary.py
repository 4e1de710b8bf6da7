"""From results to tables: means over seeds with intervals, paired differences, ranks, costs, curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dare.studies.results import Costs, Missing, Result
from dare.studies.statistics import Estimate, bootstrap, holm, paired_t, ranks, sign_flip
from dare.studies.study import Panel, Plan


@dataclass(frozen=True)
class Comparison:
    """An algorithm minus the baseline over the seeds that both have.

    p_raw   of the paired t-test on solve rates
    p       the same, Holm-adjusted within the panel
    p_sign  of the sign-flip test, which assumes no distribution, unadjusted
    """

    solve_rate: Estimate
    reward: Estimate
    num_pairs: int
    p_raw: float
    p: float
    p_sign: float


@dataclass(frozen=True)
class CurvePoint:
    """Means over seeds at one evaluation."""

    spent: float
    solve_rate: Estimate
    reward: Estimate


@dataclass(frozen=True)
class Row:
    """One algorithm in one panel. `comparison` is None for the baseline and where no seed is shared."""

    panel: Panel
    algorithm: str
    seeds: list[int]
    solve_rate: Estimate
    reward: Estimate
    rank: float
    costs: Costs
    curve: list[CurvePoint]
    comparison: Comparison | None


@dataclass(frozen=True)
class Table:
    """One panel, the best first. `start` is the solve rate of the checkpoint that all runs began with."""

    panel: Panel
    start: float | None
    rows: list[Row]
    impossible: dict[str, str]
    notes: list[str]


def summarize(plan: Plan, results: Sequence[Result | Missing]) -> list[Table]:
    """One table per panel, in the order of the study."""
    return [_table(plan, panel, [item for item in results if item.cell.panel == panel]) for panel in plan.panels]


def overall(tables: Sequence[Table]) -> list[tuple[str, list[float | None], float]]:
    """(algorithm, its rank in each table or None, mean rank), the best first; algorithms in every table come first."""
    names = {row.algorithm: None for table in tables for row in table.rows}
    found = []
    for name in names:
        places = [next((row.rank for row in table.rows if row.algorithm == name), None) for table in tables]
        known = [rank for rank in places if rank is not None]
        found.append((name, places, sum(known) / len(known)))
    return sorted(found, key=lambda item: (item[1].count(None), item[2]))


def _table(plan: Plan, panel: Panel, items: Sequence[Result | Missing]) -> Table:
    baseline = plan.study.baseline or next(iter(plan.study.algorithms))
    by_name: dict[str, list[Result]] = {}
    for item in items:
        if isinstance(item, Result):
            by_name.setdefault(item.cell.algorithm, []).append(item)
    notes = _missing_notes([item for item in items if isinstance(item, Missing)])
    starts = sorted(
        {result.curve[0].solve_rate for results in by_name.values() for result in results if _has_start(result)}
    )
    if len(starts) > 1:
        notes.append(
            "evaluations of the start checkpoint differ between runs: " + ", ".join(f"{s:.4f}" for s in starts)
        )
    compared = _compare(by_name, baseline)
    solved = {name: bootstrap([r.last.solve_rate for r in results]) for name, results in by_name.items()}
    places = dict(zip(solved, ranks([estimate.mean for estimate in solved.values()]), strict=True))
    rows = [
        Row(
            panel=panel,
            algorithm=name,
            seeds=sorted(result.cell.seed for result in results),
            solve_rate=solved[name],
            reward=bootstrap([result.last.reward for result in results]),
            rank=places[name],
            costs=_mean_costs(results),
            curve=_curve(results),
            comparison=compared.get(name),
        )
        for name, results in by_name.items()
    ]
    impossible = {name: reason for (where, name), reason in plan.impossible.items() if where == panel}
    rows.sort(key=lambda row: (row.rank, row.algorithm))
    return Table(panel, starts[0] if starts else None, rows, impossible, notes)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _missing_notes(items: Sequence[Missing]) -> list[str]:
    """What is missing, in a line for all seeds and algorithms that lack the same thing for the same reason."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for item in items:
        seeds.setdefault((item.cell.algorithm, item.reason), []).append(str(item.cell.seed))
    algorithms: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (algorithm, reason), found in seeds.items():
        algorithms.setdefault((reason, tuple(found)), []).append(algorithm)
    return [
        f"{listed(names)}, {'seed' if len(found) == 1 else 'seeds'} {listed(found)}: {reason}"
        for (reason, found), names in algorithms.items()
    ]


def _has_start(result: Result) -> bool:
    return result.curve[0].step == 0


def _compare(by_name: dict[str, list[Result]], baseline: str) -> dict[str, Comparison]:
    """Every algorithm against the baseline, paired by seed."""
    base = {result.cell.seed: result.last for result in by_name.get(baseline, [])}
    differences: dict[str, list[tuple[float, float]]] = {}
    for name, results in by_name.items():
        pairs = [(result.last, base[result.cell.seed]) for result in results if result.cell.seed in base]
        if name != baseline and pairs:
            differences[name] = [(a.solve_rate - b.solve_rate, a.reward - b.reward) for a, b in pairs]
    raw = [paired_t([solved for solved, _ in pairs]) for pairs in differences.values()]
    return {
        name: Comparison(
            solve_rate=bootstrap([solved for solved, _ in pairs]),
            reward=bootstrap([reward for _, reward in pairs]),
            num_pairs=len(pairs),
            p_raw=p_raw,
            p=p,
            p_sign=sign_flip([solved for solved, _ in pairs]),
        )
        for (name, pairs), p_raw, p in zip(differences.items(), raw, holm(raw), strict=True)
    }


def _mean_costs(results: Sequence[Result]) -> Costs:
    return Costs(**{f.name: sum(getattr(r.costs, f.name) for r in results) / len(results) for f in fields(Costs)})


def _curve(results: Sequence[Result]) -> list[CurvePoint]:
    """At the steps that all seeds were evaluated at."""
    shared = sorted(set.intersection(*({point.step for point in result.curve} for result in results)))
    found = []
    for step in shared:
        points = [next(point for point in result.curve if point.step == step) for result in results]

        def mean(value: Callable[[Any], float], points: list[Any] = points) -> Estimate:
            return bootstrap([value(point) for point in points])

        found.append(CurvePoint(mean(lambda p: p.spent).mean, mean(lambda p: p.solve_rate), mean(lambda p: p.reward)))
    return found
