"""The same rows through four back ends: native, HTTP, lm-eval and OpenCompass. Writes the table of what is equal.

python -m benchmarks.backends [--out benchmarks/results/backends.md]     in the environment of `make test-backends`

Every row of the table compares a back end with the native evaluation of the same tiny checkpoint, row by row.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dare
from dare import api
from dare.evals.backend import Backend
from dare.evals.benchmarks.table import find_benchmark
from dare.evals.presets import plan
from dare.evals.suite import run_benchmark
from dare.harness.compass.run import run_opencompass
from dare.harness.lm_run import run_lm_eval
from dare.harness.planning import plan_tasks
from dare.harness.server import served
from tests.backends.conftest import FAMILIES, TASKS, Case, make_case

Record = dict[str, Any]  # "text" or "logps", and "scores"
Ask = Callable[[Case, str, Backend, str, int, Path], list[Record]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backends.md"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines += compare(make_case(Path(folder), family), Path(folder))
    head = "| model | task | back end | batch | rows | equal answers | largest difference, nats | scores | seconds |"
    text = "\n".join([_TITLE, head, "|" + "---|" * 9, *lines]) + "\n"
    options.out.write_text(text)
    print(text)


def compare(case: Case, root: Path) -> list[str]:
    """A line for every back end, task and batch size."""
    os.environ["DARE_DATA"] = str(case.data)
    local = api.evaluation_backend(dare.load(case.checkpoint), str(case.checkpoint))
    lines = []
    with served(str(case.checkpoint)) as url:
        remote = api.evaluation_backend(url)
        ways: list[tuple[str, Backend, Ask]] = [
            ("native", local, ask_native),
            ("HTTP", remote, ask_native),
            ("lm-eval", local, ask_lm_eval),
            ("OpenCompass", local, ask_opencompass),
            ("OpenCompass over HTTP", remote, ask_opencompass),
        ]
        for task in TASKS:
            for name, backend, ask in ways:
                for batch_size in (1, 32):
                    out = root / f"{task}-{name}-{batch_size}".replace(" ", "-")
                    start = time.perf_counter()
                    found = ask(case, task, backend, _style(case, task), batch_size, out)
                    seconds = time.perf_counter() - start
                    lines.append(line(case, task, name, batch_size, found, seconds))
    return lines


def line(case: Case, task: str, name: str, batch_size: int, found: list[Record], seconds: float) -> str:
    """One back end beside the native records."""
    wanted = case.native[task]
    is_generated = TASKS[task] == "generate"
    num_equal = sum(
        a["text"] == b["text"] if is_generated else a["picks"]["acc"] == b["logps"].index(max(b["logps"]))
        for a, b in zip(wanted, found, strict=True)
    )
    gaps = [
        abs(x - y)
        for a, b in zip(wanted, found, strict=True)
        for x, y in zip(a.get("logps", []), b.get("logps", []), strict=True)
    ]
    is_same = all(a["scores"] == b["scores"] for a, b in zip(wanted, found, strict=True))
    scores = ", ".join(f"{metric} {100 * case.mean(task, metric):.1f}" for metric in wanted[0]["scores"])
    gap = f"{max(gaps):.1e}" if gaps else ""
    return (
        f"| {case.family} | {task} | {name} | {batch_size} | {len(found)} | {num_equal} | {gap} | "
        f"{'equal: ' + scores if is_same else 'DIFFERENT'} | {seconds:.1f} |"
    )


def ask_native(case: Case, task: str, backend: Backend, style: str, batch_size: int, out: Path) -> list[Record]:
    [planned] = plan(
        None, [task], family=case.family, checkpoint="", overrides=_overrides(case, task, style, batch_size)
    )
    run_benchmark(backend, find_benchmark(task), planned.settings, out)
    return _lines(out / task)


def ask_lm_eval(case: Case, task: str, backend: Backend, style: str, batch_size: int, out: Path) -> list[Record]:
    run_lm_eval(backend, _plans(case, task, f"dare_{task}", style, batch_size), out)
    records = []
    for sample in _lines(out / f"dare_{task}"):
        answers = [answer[0] for answer in sample["resps"]]
        said = {"text": answers[0]} if TASKS[task] == "generate" else {"logps": [float(logp) for logp, _ in answers]}
        records.append({**said, "scores": {name: sample[name] for name in sample["metrics"]}})
    return records


def ask_opencompass(case: Case, task: str, backend: Backend, style: str, batch_size: int, out: Path) -> list[Record]:
    run_opencompass(backend, _plans(case, task, f"dare_{task}", style, batch_size), out)
    records = []
    for row in _lines(out / f"dare_{task}"):
        said = {"text": row["prediction"]} if TASKS[task] == "generate" else {"logps": row["logps"]}
        scores = {name: value[0] for name, value in row["judged"].items() if name != "pred"}
        records.append({**said, "scores": scores})
    return records


def _plans(case: Case, task: str, name: str, style: str, batch_size: int) -> Any:
    overrides = _overrides(case, task, style, batch_size)
    return plan_tasks(None, [name], family=case.family, checkpoint="", overrides=overrides)


def _overrides(case: Case, task: str, style: str, batch_size: int) -> dict[str, Any]:
    sizes = {"batch_size": batch_size, "likelihood.batch_size": batch_size, "task.style": style}
    return {**case.options(task), **sizes}


def _style(case: Case, task: str) -> str:
    return "chat" if case.family == "sdar" and TASKS[task] == "generate" else "text"


def _lines(folder: Path) -> list[Record]:
    return [json.loads(text) for text in (folder / "records.jsonl").read_text().splitlines()]


_TITLE = """# Four back ends, one answer

Made by `python -m benchmarks.backends`; tiny random checkpoints: `llada` (masked, plain text), `sdar` (block, chat).
Each line compares a back end with the native evaluation, row by row: completions (or the choice picked), likelihoods,
and every row's scores. Greedy, two solved examples, five draws per likelihood.
"""

if __name__ == "__main__":
    main()
