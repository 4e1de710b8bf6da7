"""Sample completions for reading: before and after on the same problems, and the order in which tokens came."""

from __future__ import annotations

from dataclasses import dataclass

from dare.report.run_data import Record
from dare.terminal.text import visible

NUM_SHADES = 8
_HELD_OUT = ("eval", "shown")  # shown: rows of data that nobody judges
_WORDS = {"train": "rollouts", "shown": "completions of rows"}


@dataclass(frozen=True)
class Pair:
    """One held-out problem; `before` is None if the first evaluation did not record it."""

    prompt: str
    before: Record | None
    after: Record


@dataclass(frozen=True)
class Cell:
    """One token. `shade` in [0, NUM_SHADES), early to late; None where the token was given or never sampled."""

    text: str
    step: int | None  # 1-based
    shade: int | None
    has_border: bool  # a block starts here
    hover: str


@dataclass(frozen=True)
class Order:
    prompt: str
    title: str
    cells: list[Cell]


def pairs(samples: list[Record], limit: int) -> list[Pair]:
    """The first `limit` problems of the last evaluation, in file order; the last rollouts if there was none."""
    held_out = _held_out(samples)
    if not held_out:
        return [Pair(str(sample["prompt"]), None, sample) for sample in _last(samples)[:limit]]
    first_step = held_out[0]["step"]
    last = _last(held_out)
    has_before = first_step < last[0]["step"]
    before = {s["uid"]: s for s in held_out if s["step"] == first_step} if has_before else {}
    return [Pair(str(sample["prompt"]), before.get(sample["uid"]), sample) for sample in last[:limit]]


def orders(samples: list[Record], limit: int) -> list[Order]:
    """The denoising order of the first `limit` completions of the last evaluation that recorded one."""
    recorded = [sample for sample in samples if _has_order(sample)]
    return [_order(sample) for sample in _last(_held_out(recorded) or recorded)[:limit]]


@dataclass(frozen=True)
class Group:
    """The samples of one step with the order of their tokens, where it was recorded."""

    title: str
    samples: list[tuple[Record, Order | None]]


def browser(samples: list[Record], max_groups: int, max_samples: int) -> list[Group]:
    """All recorded samples, the newest first, grouped by step and split; at most so many of each."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for sample in samples:
        groups.setdefault((sample["step"], str(sample.get("split", "eval"))), []).append(sample)
    found = []
    for (step, split), members in sorted(groups.items(), reverse=True)[:max_groups]:
        shown = members[:max_samples]
        judged = [bool(sample["is_solved"]) for sample in members if "is_solved" in sample]
        result = f": {sum(judged)} of {len(judged)} solved" if judged else ""
        title = f"step {step}, {_WORDS.get(split, split)}{result}"
        found.append(Group(title, [(s, _order(s) if _has_order(s) else None) for s in shown]))
    return found


def _held_out(samples: list[Record]) -> list[Record]:
    """Samples of evaluations, or else of rows that are decoded to look at."""
    by_split = {name: [s for s in samples if s.get("split", "eval") == name] for name in _HELD_OUT}
    return next((found for found in by_split.values() if found), [])


def _has_order(sample: Record) -> bool:
    return bool(sample.get("tokens")) and len(sample["tokens"]) == len(sample.get("step_map", ()))


def _last(samples: list[Record]) -> list[Record]:
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def _order(sample: Record) -> Order:
    steps: list[int] = sample["step_map"]
    # Steps at which no token took its final value (in the part that is shown) leave gaps; shades follow the ranks.
    ranks = {step: rank for rank, step in enumerate(sorted({step for step in steps if step >= 0}))}
    blocks: list[int] = sample.get("block") or [0] * len(steps)
    logps: list[float | None] = sample.get("logp") or [None] * len(steps)
    if len(blocks) != len(steps) or len(logps) != len(steps):
        blocks, logps = [0] * len(steps), [None] * len(steps)
    cells = []
    for index, (token, step) in enumerate(zip(sample["tokens"], steps, strict=True)):
        logp = logps[index]
        cells.append(
            Cell(
                text=visible(str(token)),
                step=step + 1 if step >= 0 else None,
                shade=ranks[step] * (NUM_SHADES - 1) // max(len(ranks) - 1, 1) if step >= 0 else None,
                has_border=index > 0 and blocks[index] != blocks[index - 1],
                hover=_hover(step, logp),
            )
        )
    reward = f", reward {float(sample['reward']):.4g}" if "reward" in sample else ""
    title = f"{_count(len(steps), 'token')} in {_count(len(ranks), 'step')}{reward}"
    return Order(str(sample["prompt"]), title, cells)


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def _hover(step: int, logp: float | None) -> str:
    when = f"step {step + 1}" if step >= 0 else "not sampled"
    return when if logp is None or step < 0 else f"{when}, log-prob {logp:.3f}"
