"""The result as a Markdown table, for README files and pull requests."""

from __future__ import annotations

import re

from dare.report.comparison import Comparison
from dare.report.diagnoses import diagnose
from dare.report.page import COLUMNS
from dare.report.run_data import RunData
from dare.report.samples import pairs
from dare.report.templating import points
from dare.terminal.text import number, percent, shorten, visible

_NUM_PAIRS = 5


def render_markdown(run: RunData, comparison: Comparison) -> str:
    """Headline, table of evaluations, what is missing, a few completions, and a link to the curves."""
    lines = [f"# {_cell(run.name)}", ""]
    if comparison.change is not None:
        before, after = comparison.rows[-2].evaluation, comparison.rows[-1].evaluation
        change = comparison.change
        unclear = ", which includes no change" if change.includes_zero else ""
        lines += [
            f"{percent(before['solve_rate'])} → **{percent(after['solve_rate'])}** solved: "
            f"{points(change.value)} points (95% interval {points(change.low)} to {points(change.high)}{unclear}).",
            "",
        ]
    if comparison.rows:
        lines += [*_table(comparison), ""]
    if comparison.differing:
        lines += [f"Not comparable: {_cell('; '.join(comparison.differing))}", ""]
    lines += [f"- {_cell(note)}" for note in run.missing]
    lines += [f"- **{_cell(f.title)}** ({f.level}): {_cell(f.evidence)}. {_cell(f.advice)}" for f in diagnose(run)]
    lines += ["", "![curves](curves.svg)", ""]
    shown = pairs(run.samples, _NUM_PAIRS)
    if shown:
        lines += ["| prompt | completion | reward | solved |", "|---|---|---:|---|"]
    for pair in shown:
        is_solved = pair.after.get("is_solved")
        solved = "–" if is_solved is None else "yes" if is_solved else "no"
        reward = number(float(pair.after["reward"])) if "reward" in pair.after else "–"
        texts = f"{_code(pair.prompt)} | {_code(str(pair.after['completion']))}"
        lines.append(f"| {texts} | {reward} | {solved} |")
    return "\n".join(lines) + "\n"


def _table(comparison: Comparison) -> list[str]:
    names = ["model", "task", "solved", "rate", "95% interval", *(name for name, _ in COLUMNS)]
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    for row in comparison.rows:
        e = row.evaluation
        cells = [
            _cell(row.label),
            _cell(f"{e['task']} ({e['split']})"),
            f"{e['num_solved']} / {e['num']}",
            percent(e["solve_rate"]),
            f"{percent(e['low'])} – {percent(e['high'])}",
            *(cell(row) for _, cell in COLUMNS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    """Text that cannot leave its table cell nor become markup."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", visible(text))


def _code(text: str, width: int = 60) -> str:
    """A code span; backticks and bars cannot be escaped inside one, so look-alikes stand for them."""
    inner = shorten(visible(text), width).replace("`", "ˋ").replace("|", "∣")
    return f"` {inner} `" if inner else ""
