"""The HTML page: everything the template needs, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from dare.report.comparison import Comparison, Row
from dare.report.curves import charts
from dare.report.diagnoses import CHECKS, diagnose, unchecked
from dare.report.drawing import Drawing, draw
from dare.report.reference import Reference
from dare.report.run_data import RunData
from dare.report.samples import NUM_SHADES, browser, orders, pairs
from dare.report.templating import environment
from dare.terminal.metrics import time_split
from dare.terminal.text import duration, percent, rate

NUM_PAIRS = 10
NUM_ORDERS = 4
NUM_GROUPS = 24
NUM_BROWSED = 16


@dataclass(frozen=True)
class Cost:
    """Where the time of a stage went: (phase, share) and facts in words."""

    split: list[tuple[str, float]]
    facts: list[str]


@dataclass(frozen=True)
class Stage:
    run: RunData
    drawings: list[Drawing]
    cost: Cost | None


def render(
    stages: list[RunData], comparison: Comparison, reference: Reference | None = None, *, is_live: bool = False
) -> str:
    """The page of the last stage, with the earlier ones before it.

    reference  what a shipped run of the same recipe reached
    is_live    whether the page asks its server for changes, as that of `dare watch` does
    """
    run = stages[-1]
    shown = pairs(run.samples, NUM_PAIRS)
    left_out = unchecked(run)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            facts=_facts(run),
            comparison=comparison,
            columns=COLUMNS,
            stages=[_stage(stage, reference if stage is run else None) for stage in stages],
            reference=reference,
            findings=diagnose(run),
            num_checks=len(CHECKS) - len(left_out),
            unchecked=left_out,
            browser=browser(run.samples, NUM_GROUPS, NUM_BROWSED),
            browser_note=f"The newest {NUM_GROUPS} groups, at most {NUM_BROWSED} samples of each, as logged.",
            is_live=is_live,
            pairs=shown,
            has_before=any(pair.before for pair in shown),
            samples_note=_samples_note(run, len(shown)),
            orders=orders(run.samples, NUM_ORDERS),
            num_shades=NUM_SHADES,
            origin=_origin(run),
        )
    )


def _stage(run: RunData, reference: Reference | None) -> Stage:
    found = charts(run, reference.evaluations if reference is not None else None)
    return Stage(run, [draw(chart) for chart in found], cost(run))


def _column(name: str, style: Callable[[float], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return "–" if value is None else style(value)

    return cell


COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("reward", _column("reward_mean", lambda value: f"{value:.3f}")),
    ("NFE", _column("nfe", lambda value: f"{value:.1f}")),
    ("tokens / forward", _column("tokens_per_forward", lambda value: f"{value:.2f}")),
    ("EOS", _column("eos_rate", percent)),
    ("truncated", _column("truncation_rate", percent)),
]


def cost(run: RunData) -> Cost | None:
    """Totals over all steps; None without timings."""
    if not run.timing:
        return None
    names = [name for name in run.timing[-1] if name != "step"]
    totals = {name: sum(float(record.get(name, 0.0)) for record in run.timing) for name in names}
    seconds = [float(record["seconds"]) for record in run.timing if "seconds" in record]
    speeds = [float(record["tokens_per_s"]) for record in run.timing if "tokens_per_s" in record]
    memory = [float(record["peak_memory_mb"]) for record in run.timing if "peak_memory_mb" in record]
    facts = []
    if seconds:
        facts.append(f"{duration(sum(seconds))} in {len(seconds)} steps, median {duration(median(seconds))}")
    if speeds:
        facts.append(f"median {rate(median(speeds))} tokens/s")
    if memory:
        facts.append(f"peak memory {max(memory) / 1024:.1f} GiB")
    return Cost(time_split(totals), facts)


def _facts(run: RunData) -> list[tuple[str, str]]:
    recipe = run.recipe
    facts = [("algorithm", run.algorithm)]
    if recipe.get("task"):
        facts.append(("task", str(recipe["task"].get("name"))))
    model = recipe.get("model", {})
    created = model.get("create")
    is_new = isinstance(created, dict)  # anything may be in the file of a damaged run
    facts.append(("model", f"new {created.get('family')}" if is_new else str(model.get("path", "?"))))
    of = f" of {run.num_steps}" if run.num_steps else ""
    facts.append(("steps", f"{run.last_step}{of}"))
    if "seed" in recipe:
        facts.append(("seed", str(recipe["seed"])))
    if "seconds" in run.info:
        facts.append(("duration", duration(float(run.info["seconds"]))))
    return facts


def _samples_note(run: RunData, num: int) -> str:
    if not num:
        return ""
    step = run.samples[-1]["step"]
    splits = {sample.get("split", "eval") for sample in run.samples}
    if "eval" in splits:
        return f"The first {num} held-out problems of the last evaluation. Nothing is selected by its reward."
    if "shown" in splits:
        return f"Rows of the data, decoded at step {step} to look at; nothing judges them."
    return f"{num} rollouts of step {step}. Nothing is selected by its reward."


def _origin(run: RunData) -> str:
    """Versions and machine, as far as run.json has them."""
    versions: dict[str, Any] = run.info.get("versions", {})
    machine: dict[str, Any] = run.info.get("machine", {})
    parts = [f"{name} {version}" for name, version in versions.items()]
    parts += [str(value) if name == "system" else f"{name} {value}" for name, value in machine.items()]
    return " · ".join(parts)
