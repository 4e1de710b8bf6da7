"""Which metrics are shown, in which order, under which label, in which unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from dare.terminal.text import number, percent


class Shown(NamedTuple):
    label: str
    format: Callable[[float], str] = number


SHOWN: dict[str, Shown] = {
    "reward": Shown("reward"),
    "trained_reward": Shown("trained reward"),
    "solve_rate": Shown("solved", percent),
    "loss": Shown("loss"),
    "kl": Shown("KL"),
    "ratio": Shown("ratio"),
    "clip_fraction": Shown("clipped", percent),
    "grad_norm": Shown("grad norm"),
    "lr": Shown("lr"),
    "zero_variance_groups": Shown("equal groups", percent),
    "kept_groups": Shown("kept groups", percent),
    "completion_length": Shown("length"),
    "eos_rate": Shown("EOS", percent),
    "truncation_rate": Shown("truncated", percent),
    "nfe": Shown("NFE"),
    "tokens_per_forward": Shown("tokens/forward"),
}


def labelled(metrics: Mapping[str, float], *, has_others: bool) -> list[tuple[str, str]]:
    """(label, value) of the known metrics in a fixed order, then of the others under their own names."""
    known = [(SHOWN[name].label, SHOWN[name].format(metrics[name])) for name in SHOWN if name in metrics]
    others = [(name, number(value)) for name, value in metrics.items() if name not in SHOWN and has_others]
    return known + others


def time_split(timings: Mapping[str, float]) -> list[tuple[str, float]]:
    """(phase, share of the step) for every phase of a step, in the order it ran."""
    is_phase = {name: name.endswith("_s") and name != "tokens_per_s" for name in timings}
    phases = {name.removesuffix("_s"): value for name, value in timings.items() if is_phase[name]}
    total = sum(phases.values())
    return [(name, value / total) for name, value in phases.items()] if total > 0 else []
