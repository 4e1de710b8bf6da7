"""What stands out in a run, in plain language: each check is a pure function from a run's data to at most one finding.

A check compares means over the first and the last tenth of the steps (at least 1, at most 20). It returns None where
nothing is wrong or where the run did not log what it needs; `unchecked` lists the latter. Thresholds are rules of
thumb, stated in the finding, so that a reader can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dare.report.comparison import difference
from dare.report.run_data import RunData
from dare.terminal.text import number, percent

_MIN_STEPS = 5  # fewer say nothing


@dataclass(frozen=True)
class Finding:
    """`problem`: the run is not doing what it should; `note`: worth knowing. `advice` is what to try, "" if nothing."""

    level: Literal["problem", "note"]
    title: str
    evidence: str
    advice: str = ""


class Trend(NamedTuple):
    """Means of a metric over the first and over the last tenth of the steps."""

    early: float
    late: float

    @property
    def change(self) -> float:
        return self.late - self.early

    def words(self, style: Callable[[float], str] = number) -> str:
        return f"{style(self.early)} → {style(self.late)}"


class Check(NamedTuple):
    """needs  metrics without which the check cannot be made"""

    name: str
    needs: tuple[str, ...]
    find: Callable[[RunData], Finding | None]


def diagnose(run: RunData) -> list[Finding]:
    """All findings, problems first, in the order of the table."""
    found = [finding for check in CHECKS if _is_possible(run, check) and (finding := check.find(run)) is not None]
    return sorted(found, key=lambda finding: finding.level != "problem")


def unchecked(run: RunData) -> list[str]:
    """Names of the checks that this run did not log enough for."""
    return [check.name for check in CHECKS if not _is_possible(run, check)]


def trend(run: RunData, name: str) -> Trend:
    """Raises KeyError if no step has a finite value of the metric."""
    values = [float(r[name]) for r in run.metrics if _is_finite(r.get(name))]
    if not values:
        raise KeyError(name)
    num = max(1, min(20, len(values) // 10))
    return Trend(sum(values[:num]) / num, sum(values[-num:]) / num)


def format_collapse(run: RunData) -> Finding | None:
    """The reward comes from parts that need no solution."""
    reward, solved = trend(run, "reward"), trend(run, "solve_rate")
    unearned = Trend(reward.early - solved.early, reward.late - solved.late)
    is_rising = reward.change > 0.02 and solved.change < 0.01
    is_partial = solved.late < 0.05 and unearned.late > 0.05
    if not (is_rising or is_partial):
        return None
    parts = [name for name in run.metrics[-1] if name.startswith("reward/") and name != "reward/correct"]
    listed = ", ".join(f"{name.removeprefix('reward/')} {number(float(run.metrics[-1][name]))}" for name in parts)
    return Finding(
        "problem",
        "The reward is not earned by solving",
        f"reward {reward.words()}, solve rate {solved.words(percent)}"
        + (f"; parts at the end: {listed}" if parts else ""),
        "Weigh the format reward less or drop it, or start from a model that solves some problems.",
    )


def standstill(run: RunData) -> Finding | None:
    """The sampled completions solve no more at the end than at the start."""
    solved = trend(run, "solve_rate")
    is_early = run.num_steps is not None and run.last_step < run.num_steps / 2
    if is_early or len(run.metrics) < 20 or solved.change > 0.01 or solved.early > 0.9:
        return None
    return Finding(
        "problem",
        "Training has not helped",
        f"solve rate of the rollouts {solved.words(percent)} over {len(run.metrics)} steps; a gain of at most 1 point "
        "is reported",
        "Compare with the recipe's reference curve; try another optimizer.lr, more completions per prompt, or views "
        "that are closer to what the sampler sees.",
    )


def equal_groups(run: RunData) -> Finding | None:
    """Groups whose completions all earn the same teach nothing."""
    groups, solved = trend(run, "zero_variance_groups"), trend(run, "solve_rate")
    if groups.late < 0.5:
        return None
    if solved.late > 0.8:
        why, advice = "most are solved by every completion", "Train on harder problems, or stop here."
    elif solved.late < 0.1:
        why, advice = "most are solved by none", "Start with easier problems, or fine-tune first."
    else:
        why, advice = "completions of a prompt are nearly the same", "Raise decode.temperature or the group size."
    return Finding(
        "problem" if groups.late > 0.8 else "note",
        "Many groups teach nothing",
        f"in {percent(groups.late)} of the groups all completions earn the same reward ({why}); above 50% is reported",
        advice,
    )


def entropy_loss(run: RunData) -> Finding | None:
    """The sampler has hardly any choice left."""
    nll, solved = trend(run, "commit_nll"), trend(run, "solve_rate")
    is_falling = nll.early > 0.05 and nll.late < nll.early / 4 and solved.change < 0.05
    if nll.late > 0.02 and not is_falling:
        return None
    return Finding(
        "note" if solved.late > 0.8 else "problem",
        "The policy has lost its variety",
        f"negative log-prob of sampled tokens {nll.words()} nats per token; below 0.02 is reported, and a fall to a "
        "quarter that solves no more",
        "Lower optimizer.lr, add a KL term (beta), or raise decode.temperature.",
    )


def length_drift(run: RunData) -> Finding | None:
    """Completions got much longer or shorter."""
    length = trend(run, "completion_length")
    if length.early <= 0 or 2 / 3 <= length.late / length.early <= 1.5:
        return None
    word = "longer" if length.change > 0 else "shorter"
    return Finding(
        "note",
        f"Completions became much {word}",
        f"{length.words()} tokens; a change by more than half is reported",
        "Read samples of the last steps: is the reward the reason?",
    )


def early_eos(run: RunData) -> Finding | None:
    """Completions end before there is room for an answer."""
    length, solved = trend(run, "completion_length"), trend(run, "solve_rate")
    allowed = run.setting("decode", "gen_length")
    if allowed is None or length.late > 0.25 * allowed or solved.late > 0.5:
        return None
    if length.late > 2.0 and length.change > -0.2 * length.early:
        return None
    return Finding(
        "problem",
        "Completions end too early",
        f"{length.words()} tokens of {allowed:g} allowed, solve rate {solved.words(percent)}",
        "Try decode.zero_eos_confidence=true or decode.forbid_eos=true, and check that EOS carries loss once in SFT.",
    )


def truncation(run: RunData) -> Finding | None:
    """Completions run into the limit."""
    share = trend(run, "truncation_rate")
    if share.late < 0.3:
        return None
    return Finding(
        "note",
        "Many completions never end",
        f"{percent(share.late)} run to their full length without an EOS; above 30% is reported",
        "Raise decode.gen_length, or fine-tune on data that ends with EOS.",
    )


def clipping(run: RunData) -> Finding | None:
    """The clip of the policy ratio never acts, or acts nearly always."""
    values = [float(r["clip_fraction"]) for r in run.metrics if _is_finite(r.get("clip_fraction"))]
    num_updates = run.setting("train", "updates_per_rollout") or 1.0
    if max(values) == 0.0:
        if num_updates == 1:
            evidence = "each rollout is used for one update, so the ratio is 1 by construction"
            return Finding("note", "Clipping cannot act", evidence, "Set train.updates_per_rollout to reuse rollouts.")
        evidence = f"no ratio left the clip range in {len(values)} steps of {num_updates:g} updates each"
        return Finding("note", "Clipping never acts", evidence, "The updates are small: optimizer.lr may be raised.")
    late = trend(run, "clip_fraction").late
    if late < 0.3:
        return None
    return Finding(
        "problem",
        "Clipping acts nearly always",
        f"{percent(late)} of the ratios are clipped at the end; above 30% is reported",
        "Lower optimizer.lr or train.updates_per_rollout.",
    )


def _largest(run: RunData, name: str) -> float:
    """The largest value that a metric took."""
    return max(float(row[name]) for row in run.metrics if _is_finite(row.get(name)))


def mismatch(run: RunData) -> Finding | None:
    """Trainer and rollout disagree about the same tokens on the same canvases."""
    gap = _largest(run, "rollout_gap")
    if gap < 0.01:
        return None
    return Finding(
        "problem" if gap > 0.1 else "note",
        "Trainer and rollout disagree",
        f"log-probs of the same tokens differ by up to {number(gap)} nats on average; above 0.01 is reported",
        "Use cache: auto (approximate caches do this), and one dtype on both sides.",
    )


def replay(run: RunData) -> Finding | None:
    """The two passes of an update are not the same function."""
    gap = _largest(run, "replay_gap")
    if gap < 1e-3:
        return None
    return Finding(
        "problem",
        "The two passes of an update differ",
        f"log-probs differ by up to {number(gap)} nats; gradients are then not exact (above 0.001 is reported)",
        "Dropout or router noise must be off; in bfloat16 small gaps are rounding.",
    )


def padding(run: RunData) -> Finding | None:
    """Much of the computation is padding."""
    share = trend(run, "padding_share").late
    if share < 0.4:
        return None
    return Finding(
        "note",
        "Much of every batch is padding",
        f"{percent(share)} of the positions of a rollout; above 40% is reported",
        "Prompts differ much in length: lower decode.batch_size, so that rows of like length share a batch.",
    )


def fell(run: RunData) -> Finding | None:
    """The held-out solve rate is below where it started."""
    first, last = run.evaluations[0], run.evaluations[-1]
    change = difference(first, last)
    if first is last or change.high >= 0.0:
        return None
    return Finding(
        "problem",
        "The model got worse",
        f"held-out solve rate {percent(first['solve_rate'])} at step {first['step']}, {percent(last['solve_rate'])} at "
        f"step {last['step']}; the 95% interval of the change excludes 0",
        "Lower optimizer.lr, or use an earlier checkpoint.",
    )


def dropped_from_best(run: RunData) -> Finding | None:
    """An earlier evaluation was better than the last one."""
    best, last = max(run.evaluations, key=lambda e: float(e["solve_rate"])), run.evaluations[-1]
    if best is run.evaluations[0] or difference(best, last).high >= 0.0:
        return None
    return Finding(
        "note",
        "The best evaluation is not the last",
        f"{percent(best['solve_rate'])} at step {best['step']}, {percent(last['solve_rate'])} at step {last['step']}; "
        "the 95% interval of the change excludes 0",
        "Use a decaying learning rate, and keep checkpoints of every evaluation.",
    )


CHECKS: tuple[Check, ...] = (
    Check("reward without solving", ("reward", "solve_rate"), format_collapse),
    Check("standstill", ("solve_rate",), standstill),
    Check("the model got worse", ("eval",), fell),
    Check("the best evaluation is not the last", ("eval",), dropped_from_best),
    Check("groups with equal rewards", ("zero_variance_groups", "solve_rate"), equal_groups),
    Check("loss of variety", ("commit_nll", "solve_rate"), entropy_loss),
    Check("EOS too early", ("completion_length", "solve_rate"), early_eos),
    Check("length drift", ("completion_length",), length_drift),
    Check("completions that never end", ("truncation_rate",), truncation),
    Check("clipping", ("clip_fraction",), clipping),
    Check("trainer against rollout", ("rollout_gap",), mismatch),
    Check("the two passes of an update", ("replay_gap",), replay),
    Check("padding", ("padding_share",), padding),
)


def _is_possible(run: RunData, check: Check) -> bool:
    if check.needs == ("eval",):
        return len(run.evaluations) > 1
    num = min(sum(_is_finite(r.get(name)) for r in run.metrics) for name in check.needs)
    return num >= _MIN_STEPS


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
