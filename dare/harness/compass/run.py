"""`dare eval --backend opencompass`: OpenCompass's own tasks on the loaded model, without a process for each.

A task is
    dare_NAME    a benchmark of `dare data path`: the native prompts and scorer, OpenCompass's tasks
    NAME         a configuration of OpenCompass by its file name, such as gsm8k_gen_1d7fe4 or mmlu_ppl_ac766d
    FILE.py      a configuration of one's own
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mmengine
from mmengine.config import ConfigDict
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask

from dare.core.errors import DareError
from dare.evals.backend import Backend, NativeBackend, hash_file
from dare.evals.benchmarks.table import find_benchmark
from dare.evals.presets import Planned
from dare.harness.compass.configuration import (
    benchmark_datasets,
    check_data,
    class_name,
    conditional_likelihood,
    find_datasets,
    limit_rows,
    sandboxed,
)
from dare.harness.compass.model import DareModel
from dare.harness.planning import OWN, lasting
from dare.harness.result import Outcome, result_folder, run_once

_HARNESS = "opencompass"
_ABBR = "dare"
_BATCH_SIZE = 64  # prompts that OpenCompass hands over at once; never changes a result


@dataclass(frozen=True)
class _Job:
    planned: Planned
    datasets: list[ConfigDict]
    inputs: list[str]  # hashes of the files that it reads, as far as they are known


def run_opencompass(
    backend: Backend,
    planned: Sequence[Planned],
    out: Path,
    *,
    is_weak_sandbox_allowed: bool = False,
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The result of every task, also in OUT/TASK/result.json; a task that is done there is not run again.

    All data is loaded before the first forward, and a task whose results are not all there is an error, other than in
    OpenCompass. Settings apply as in the native evaluation, except that a configuration's own examples hold.
    Raises DareError for an unknown task, missing data, programs that could not be isolated, several samples of a
    document, and a task that failed.
    """
    jobs = [_prepare(item, backend, is_weak_sandbox_allowed) for item in planned]
    results = {}
    for job in jobs:
        name = job.planned.task
        asked = {
            "task": name,
            "settings": lasting(job.planned.settings),
            "facts": job.planned.facts,
            "prompt_hashes": {dataset["abbr"]: _prompt_hash(dataset) for dataset in job.datasets},
            "inputs_sha256": job.inputs,
        }
        folder = result_folder(out, name)
        results[name] = run_once(folder, _HARNESS, asked, backend.describe(), partial(_evaluate, job, backend, folder))
        if on_result is not None:
            on_result(name, results[name])
    return results


def _prepare(planned: Planned, backend: Backend, is_weak_allowed: bool) -> _Job:
    name, settings = planned.task, planned.settings
    if settings.num_samples > 1:
        raise DareError(
            "this back end judges one completion of a document",
            where="task.num_samples",
            got=settings.num_samples,
            fix="leave it out, or use the native evaluation",
        )
    inputs: list[Path] = []
    if name.startswith(OWN):
        own = name.removeprefix(OWN)
        path = find_benchmark(own).data_path()
        inputs = [] if path is None else [path]
        style = backend.default_style() if settings.style == "auto" else settings.style
        if settings.method == "likelihood":
            style = "text"
        datasets = benchmark_datasets(own, settings, style, is_weak_sandbox_allowed=is_weak_allowed)
    else:
        if "num_shots" in settings.model_fields_set:
            raise DareError("a configuration of OpenCompass has its own examples", where="task.num_shots")
        inputs = [Path(name)] if name.endswith(".py") else []
        datasets = sandboxed(conditional_likelihood(find_datasets(name)), is_weak_allowed=is_weak_allowed)
        for dataset in datasets:
            limit_rows(dataset, settings.limit)
    for dataset in datasets:
        check_data(dataset)
    return _Job(planned, datasets, [hash_file(path) for path in inputs])


def _evaluate(job: _Job, backend: Backend, folder: Path) -> Outcome:
    """Everything of an unfinished run is thrown away first: OpenCompass would go on with half a file."""
    work = folder / "opencompass"
    shutil.rmtree(work, ignore_errors=True)
    settings = job.planned.settings
    max_length = backend.family.spec.max_length if isinstance(backend, NativeBackend) else None
    records: list[dict[str, Any]] = []
    scores: dict[str, dict[str, Any]] = {}
    for dataset in job.datasets:
        model = DareModel(
            str(backend.describe().get("checkpoint")),
            max_length,
            decode=settings.decode.model_dump(exclude_unset=True),
            likelihood=settings.likelihood.model_dump(),
            seed=settings.seed,
            style=settings.style,
            backend=backend,
        )
        scores[dataset["abbr"]], found = _run_dataset(dataset, model, max_length, work)
        records += found
    details = {"scores": scores}
    return Outcome(_overall(scores), len(records), records, details)


def _run_dataset(
    dataset: ConfigDict, model: DareModel, max_length: int | None, work: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The evaluator's numbers of one data set, and a record of every row."""
    task = ConfigDict(
        models=[
            {
                "abbr": _ABBR,
                "type": DareModel,
                "path": model.path,
                "max_seq_len": max_length,
                "max_out_len": 256,  # of data sets that name none, where decode has no gen_length
                "batch_size": _BATCH_SIZE,
                "run_cfg": {"num_gpus": 0},
            }
        ],
        datasets=[[dataset]],
        work_dir=str(work),
        eval={"runner": {"task": {"dump_details": True}}},
    )
    OpenICLInferTask(task).run(cur_model=model, cur_model_abbr=_ABBR)
    OpenICLEvalTask(task).run()
    place = Path(_ABBR) / f"{dataset['abbr']}.json"
    predictions, results = work / "predictions" / place, work / "results" / place
    for path in (predictions, results):
        if not path.is_file():
            raise DareError("OpenCompass has not finished the task", where=dataset["abbr"], expected=str(path))
    answered, scored = mmengine.load(predictions), mmengine.load(results)
    if "error" in scored:
        raise DareError("OpenCompass could not score the task", where=dataset["abbr"], got=scored["error"])
    details = scored.pop("details", None)
    rows = [{"dataset": dataset["abbr"], "index": int(index), **row} for index, row in answered.items()]
    if isinstance(details, dict):
        details = [details[str(index)] for index in range(len(rows)) if str(index) in details]
    if isinstance(details, list) and len(details) == len(rows):
        rows = [{**row, "judged": judged} for row, judged in zip(rows, details, strict=True)]
    return {name: value for name, value in scored.items() if isinstance(value, int | float)}, rows


def _overall(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """A data set's own numbers; of several, the plain mean of each number, as OpenCompass's summaries have it."""
    names = {name: None for row in scores.values() for name in row}
    if len(scores) == 1:
        return dict(next(iter(scores.values())))
    whole = {name: [row[name] for row in scores.values() if name in row] for name in names}
    return {f"{name} (mean of {len(values)})": sum(values) / len(values) for name, values in whole.items()}


def _prompt_hash(dataset: ConfigDict) -> str:
    """Over templates, examples and inferencer, with classes by name."""
    text = json.dumps(dataset["infer_cfg"].to_dict(), sort_keys=True, default=class_name)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
