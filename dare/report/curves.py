"""Which curves a run has: the content of the charts, whatever draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dare.report.run_data import Record, RunData

Unit = Literal["percent", "number"]
ORDERED_TONES = ("n0", "n1", "n2", "n3", "n4")  # of curves that have an order among themselves
_MAX_POINTS = 300  # a longer curve is averaged in bins of consecutive steps


@dataclass(frozen=True)
class Series:
    """One curve. With `low` and `high` the values are evaluations with 95% intervals, drawn as points."""

    label: str
    steps: list[float]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    is_points: bool = False
    tone: str | None = None  # of `dare.report.drawing.Stroke`; None: by what the series is


@dataclass(frozen=True)
class Chart:
    title: str
    unit: Unit
    series: list[Series]
    note: str = ""
    x_name: str = "step"  # what the numbers in `Series.steps` count
    has_latest: bool = True  # whether the last value of the last curve says something by itself


# (title, unit, training metrics with their labels, evaluation metric)
_CHARTS: tuple[tuple[str, Unit, tuple[tuple[str, str], ...], str | None], ...] = (
    ("Solve rate", "percent", (("solve_rate", "rollouts"),), "solve_rate"),
    ("Reward", "number", (("reward", "rollouts"), ("trained_reward", "trained reward")), "reward_mean"),
    ("Loss", "number", (("loss", "loss"),), None),
    ("Held-out loss, nats per token", "number", (), "nll_per_token"),
    ("KL", "number", (("kl", "KL"),), None),
    ("Policy ratio", "number", (("ratio", "ratio"),), None),
    ("Gradient norm", "number", (("grad_norm", "gradient norm"),), None),
    ("Completion length, tokens", "number", (("completion_length", "rollouts"),), "completion_length"),
    ("EOS and truncation", "percent", (("eos_rate", "ends with EOS"), ("truncation_rate", "truncated")), None),
    ("Groups with equal rewards", "percent", (("zero_variance_groups", "share of groups"),), None),
    ("Negative log-prob at commit", "number", (("commit_nll", "nats per token"),), None),
    ("Clipped ratios", "percent", (("clip_fraction", "share"),), None),
    ("Groups that are trained on", "percent", (("kept_groups", "share of groups"),), None),
    ("Tokens per forward", "number", (("tokens_per_forward", "rollouts"),), "tokens_per_forward"),
)
_NOISE_TITLE = "Loss by noise level, nats per token"
_NOISE_NOTE = "share of masked tokens; smoothed"
_NOISE_PREFIX = "nll_at/"
_SMOOTHING_SHARE = 0.05  # time constant of a smoothed curve, of the run's length


def charts(run: RunData, reference: list[Record] | None = None) -> list[Chart]:
    """The charts that the run has data for, in a fixed order.

    reference  evaluations of a shipped run of the same recipe, drawn beside the run's own
    """
    found = []
    for title, unit, metrics, evaluation in _CHARTS:
        series = [_training(run.metrics, name, label) for name, label in metrics]
        if evaluation is not None:
            series.append(_held_out([*run.evaluations, *run.validations], evaluation))
            series.append(_reference(reference or [], evaluation))
        present = [item for item in series if item.values]
        if any(item.tone is None for item in present):
            found.append(Chart(title, unit, present, _note(run.metrics, [name for name, _ in metrics])))
    levels = _by_noise(run.metrics)
    return found + ([Chart(_NOISE_TITLE, "number", levels, _NOISE_NOTE, has_latest=False)] if levels else [])


def smoothed(values: list[float], time_constant: float) -> list[float]:
    """Exponential means of the values so far, weighted as if there had been none before the first."""
    decay = math.exp(-1.0 / max(time_constant, 1e-9))
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        found.append(total / weight)
    return found


def _by_noise(records: list[Record]) -> list[Series]:
    """One smoothed curve per noise level: single steps have few tokens of each."""
    names = sorted({name for record in records for name in record if name.startswith(_NOISE_PREFIX)}, key=_lower_end)
    series = []
    for index, name in enumerate(names):
        points = [(float(r["step"]), float(r[name])) for r in records if _is_finite(r.get(name))]
        values = smoothed([value for _, value in points], len(records) * _SMOOTHING_SHARE)
        stride = math.ceil(len(points) / _MAX_POINTS) or 1
        label = f"{name.removeprefix(_NOISE_PREFIX)} %"
        steps = [step for step, _ in points]
        series.append(Series(label, steps[::stride], values[::stride], tone=ORDERED_TONES[index % len(ORDERED_TONES)]))
    return series


def _lower_end(name: str) -> int:
    return int(name.removeprefix(_NOISE_PREFIX).partition("-")[0])


def _training(records: list[Record], name: str, label: str) -> Series:
    points = [(float(r["step"]), float(r[name])) for r in records if _is_finite(r.get(name))]
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    steps = [sum(step for step, _ in part) / len(part) for part in bins]
    values = [sum(value for _, value in part) / len(part) for part in bins]
    return Series(label if size == 1 else f"{label}, mean of {size} steps", steps, values)


def _held_out(evaluations: list[Record], name: str) -> Series:
    chosen = [record for record in evaluations if _is_finite(record.get(name))]
    steps, values = [float(r["step"]) for r in chosen], [float(r[name]) for r in chosen]
    if name != "solve_rate":
        return Series("held out", steps, values, is_points=True)
    low, high = [float(r["low"]) for r in chosen], [float(r["high"]) for r in chosen]
    return Series("held out, 95% interval", steps, values, low, high, is_points=True)


def _reference(evaluations: list[Record], name: str) -> Series:
    chosen = [record for record in evaluations if _is_finite(record.get(name))]
    steps, values = [float(r["step"]) for r in chosen], [float(r[name]) for r in chosen]
    return Series("reference", steps, values, tone="c")


def _note(records: list[Record], names: list[str]) -> str:
    num = sum(any(name in record and not _is_finite(record[name]) for name in names) for record in records)
    return f"{num} steps without a finite value are left out" if num else ""


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
