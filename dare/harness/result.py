"""What a harness's run leaves behind: result.json beside the records, written last, so that half a run is none.

OUT/TASK/asked.json      written first: a folder holds one run
OUT/TASK/records.jsonl   every document as the harness saw it
OUT/TASK/result.json     scores, counts, settings, model, versions
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.files import read_json, write_json, write_text
from dare.evals.card import flatten, package_version

FORMAT = 1
_PACKAGES = ("dare-dllm", "torch", "transformers", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True)
class Outcome:
    """A finished task: metrics as shares in [0, 1] or whatever the harness reports, and a record per document."""

    scores: dict[str, float]
    num_documents: int
    records: list[dict[str, Any]]
    details: dict[str, Any]  # what else the harness says of its run


def result_folder(out: Path, task: str) -> Path:
    """Where a task's results are: under its name, that of its file without folder and suffix, no colon in it."""
    return out / Path(task).stem.replace(":", "_")


def run_once(
    folder: Path, harness: str, asked: Mapping[str, Any], model: Mapping[str, Any], evaluate: Callable[[], Outcome]
) -> dict[str, Any]:
    """The result of `evaluate` in `folder`, or the one that is there already for the same question.

    harness  name of the package; its version goes into the result
    asked    task and settings; a folder that holds an answer to something else is refused (DareError)
    """
    facts: dict[str, Any] = json.loads(
        json.dumps({"harness": {harness: package_version(harness)}, **asked, "model": model})
    )
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / "asked.json"
    if claim.is_file():
        _check_same(folder, flatten(read_json(claim, "the settings of the run")), flatten(facts))
    else:
        write_json(claim, facts)
    path = folder / "result.json"
    if path.is_file():
        found: dict[str, Any] = read_json(path, "the result")
        return found
    begin = time.perf_counter()
    outcome = evaluate()
    result = {
        "format": FORMAT,
        **facts,
        "scores": outcome.scores,
        "num_documents": outcome.num_documents,
        "details": outcome.details,
        "versions": {name: package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - begin, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(folder / "records.jsonl", _lines(outcome.records))
    write_text(path, json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")
    return result


def result_line(task: str, result: Mapping[str, Any]) -> str:
    """One task in one line."""
    scores = [f"{name} {value:.4g}" for name, value in result["scores"].items()]
    return "  ".join([f"{task}:", *scores, f"{result['num_documents']} documents"])


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if differing:
        raise DareError(
            "the folder holds a run with other settings",
            where=str(folder),
            got=f"different {', '.join(differing)}",
            fix="choose another --out, or remove the folder",
        )


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
