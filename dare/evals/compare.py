"""Finished runs side by side: what differs between them first, then what the difference in score is worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.files import read_json, read_lines
from dare.evals.card import document_means, flatten, percent
from dare.evals.intervals import mcnemar, paired_bootstrap

_COMPARED = ("identity", "settings", "model", "versions", "sandbox_level", "python")


@dataclass(frozen=True)
class Finished:
    """One finished run of a benchmark."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def task(self) -> str:
        return str(self.manifest["identity"]["task"])

    @property
    def task_hash(self) -> str:
        return str(self.manifest["identity"]["task_hash"])


def load_runs(folder: Path) -> dict[str, Finished]:
    """Finished runs by task: of a folder of runs, or of one run.

    Raises DareError if there is none, and for an unfinished one: half a run is no result.
    """
    places = (
        [folder]
        if (folder / "settings.json").is_file()
        else sorted(path.parent for path in folder.glob("*/settings.json"))
    )
    if not places:
        raise DareError(
            "there is no evaluation here", where=str(folder), fix="give a folder that `dare eval --out` wrote"
        )
    found = {}
    for place in places:
        if not (place / "manifest.json").is_file():
            raise DareError(
                "this evaluation is unfinished", where=str(place), fix="run the same `dare eval` again; it goes on"
            )
        run = Finished(place, read_json(place / "manifest.json", "the manifest"))
        found[run.task] = run
    return found


def compare_text(first: Path, second: Path) -> str:
    """Task by task: differing settings, then the paired difference (second minus first) with its significance.

    Raises DareError if the two have no task in common. Runs whose task hashes differ are not compared, and the text
    says why.
    """
    before, after = load_runs(first), load_runs(second)
    common = [task for task in before if task in after]
    if not common:
        raise DareError(
            "the two have no task in common",
            got=f"{', '.join(before)} and {', '.join(after)}",
            fix="run the same tasks",
        )
    lines = []
    for task in common:
        lines += [f"# {task}", "", *_differences(before[task], after[task]), ""]
        if before[task].task_hash != after[task].task_hash:
            lines += ["The tasks differ (see identity above), so the scores are not comparable.", ""]
            continue
        lines += [*_significance(before[task], after[task]), ""]
    return "\n".join(lines)


def table_text(folders: list[Path]) -> str:
    """One row per folder, one column per task, as Markdown. Raises DareError if a task is not the same in all rows."""
    rows = {str(folder): load_runs(folder) for folder in folders}
    tasks = sorted({task for runs in rows.values() for task in runs})
    for task in tasks:
        hashes = {name: runs[task].task_hash for name, runs in rows.items() if task in runs}
        if len(set(hashes.values())) > 1:
            raise DareError(
                f"{task} is not the same task in all folders, so they share no table",
                got="; ".join(f"{name}: {value}" for name, value in hashes.items()),
                fix="`dare eval compare A B` shows what differs",
            )
    lines = [f"| model | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, runs in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(runs[task]) if task in runs else '' for task in tasks)} |")
    versions = [f"{task} {next(runs[task].task_hash for runs in rows.values() if task in runs)}" for task in tasks]
    lines += ["", "Score [95 % interval], tokens per forward, NFE. Task hashes: " + ", ".join(versions)]
    return "\n".join(lines) + "\n"


def _cell(run: Finished) -> str:
    score = run.manifest["scores"][run.manifest["headline"]]
    text = f"{percent(score['mean'])} [{percent(score['low'])}, {percent(score['high'])}]"
    cost = run.manifest["cost"]
    return f"{text} {cost['tokens_per_forward']:.2f} TPF {cost['nfe']:.0f} NFE" if cost else text


def _differences(first: Finished, second: Finished) -> list[str]:
    before, after = (flatten({name: run.manifest[name] for name in _COMPARED}) for run in (first, second))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not names:
        return ["All settings are equal."]
    lines = ["| differs | first | second |", "|---|---|---|"]
    return lines + [f"| {name} | {before.get(name)} | {after.get(name)} |" for name in names]


def _significance(first: Finished, second: Finished) -> list[str]:
    before, after = (read_lines(run.folder / "records.jsonl") for run in (first, second))
    lines = ["| metric | first | second | difference | 95 % interval | p |", "|---|---|---|---|---|---|"]
    for metric in first.manifest["scores"]:
        a, b = document_means(before, metric), document_means(after, metric)
        difference, low, high = paired_bootstrap(a, b)
        p = ""
        if all(value in (0.0, 1.0) for value in (*a, *b)):
            pairs = list(zip(a, b, strict=True))
            p = f"{mcnemar(pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))):.3g} (McNemar)"
        means = f"{percent(sum(a) / len(a))} | {percent(sum(b) / len(b))}"
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        lines.append(f"| {metric} | {means} | {100 * difference:+.1f} | {interval} | {p} |")
    return lines
