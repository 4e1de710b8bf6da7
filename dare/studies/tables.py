"""The machine-readable side of a study: runs.csv, summary.csv and results.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dare.studies.results import Missing, Result
from dare.studies.statistics import Estimate
from dare.studies.study import Plan
from dare.studies.summary import Row, Table


def runs_csv(results: Sequence[Result | Missing]) -> str:
    """One line per run: its place in the study, what it reached, what it cost, or why it is missing."""
    lines: list[dict[str, Any]] = []
    for item in results:
        cell = item.cell
        line = {"family": cell.panel.family, "task": cell.panel.task, "algorithm": cell.algorithm, "seed": cell.seed}
        if isinstance(item, Missing):
            lines.append({**line, "status": item.reason})
            continue
        reached = {"steps": item.last.step, "solve_rate": item.last.solve_rate, "reward": item.last.reward}
        lines.append({**line, "status": "finished", **reached, **asdict(item.costs)})
    return _csv(lines)


def summary_csv(tables: Sequence[Table]) -> str:
    """One line per algorithm of each panel; impossible pairs have a reason instead of numbers."""
    lines: list[dict[str, Any]] = []
    for table in tables:
        place = {"family": table.panel.family, "task": table.panel.task}
        lines += [{**place, **_summary(row), "start_solve_rate": table.start} for row in table.rows]
        lines += [{**place, "algorithm": name, "impossible": reason} for name, reason in table.impossible.items()]
    return _csv(lines)


def results_json(
    plan: Plan, results: Sequence[Result | Missing], tables: Sequence[Table], origin: dict[str, Any]
) -> dict[str, Any]:
    """Everything: the study, where it was made, every run with its resolved recipe and curve, every table."""
    return {
        "format": 1,
        "study": plan.study.model_dump(mode="json"),
        "origin": origin,
        "runs": [_run(item) for item in results],
        "tables": [
            {
                "family": table.panel.family,
                "task": table.panel.task,
                "start_solve_rate": table.start,
                "rows": [{**_summary(row), "curve": [asdict(point) for point in row.curve]} for row in table.rows],
                "impossible": table.impossible,
                "notes": table.notes,
            }
            for table in tables
        ],
    }


def _run(item: Result | Missing) -> dict[str, Any]:
    cell = item.cell
    found: dict[str, Any] = {
        "family": cell.panel.family,
        "task": cell.panel.task,
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "recipe": cell.recipe.model_dump(mode="json"),
    }
    if isinstance(item, Missing):
        return {**found, "missing": item.reason}
    info = {key: item.info.get(key) for key in ("versions", "python", "machine", "seconds")}
    return {**found, "curve": [asdict(point) for point in item.curve], "costs": asdict(item.costs), "info": info}


def _summary(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"algorithm": row.algorithm, "rank": row.rank, "num_seeds": len(row.seeds)}
    found |= _flat("solve_rate", row.solve_rate) | _flat("reward", row.reward)
    if row.comparison is not None:
        found |= _flat("gain_over_baseline", row.comparison.solve_rate)
        found |= _flat("reward_over_baseline", row.comparison.reward)
        found |= {"num_pairs": row.comparison.num_pairs, "p_raw": row.comparison.p_raw, "p_holm": row.comparison.p}
        found["p_sign_flip"] = row.comparison.p_sign
    return {**found, **asdict(row.costs)}


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    names = list({name: None for line in lines for name in line})
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
