"""`dare eval --backend lm-eval`: lm-eval's evaluator on the loaded model, task by task, inputs checked first.

A task is
    dare_NAME    a benchmark of `dare data path`: the native prompts and scorer, lm-eval's evaluator
    FILE.yaml    a task file; with `dataset_path: json` it needs no network
    NAME         any other task or group that lm-eval knows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

from dare.core.errors import DareError, unknown_name
from dare.evals.backend import Backend, hash_file
from dare.evals.benchmarks.programs import ProgramBenchmark
from dare.evals.benchmarks.table import BENCHMARKS, find_benchmark
from dare.evals.presets import Planned
from dare.harness.lm_model import DareLM
from dare.harness.lm_tasks import benchmark_task
from dare.harness.planning import OWN, lasting
from dare.harness.result import Outcome, result_folder, run_once
from dare.sandbox.run import Sandbox

_HARNESS = "lm_eval"
_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class _Job:
    name: str
    planned: Planned
    task: Any  # what lm-eval evaluates
    is_chat: bool
    inputs: list[str]  # hashes of the files that it reads, as far as they are known


def run_lm_eval(
    backend: Backend,
    planned: Sequence[Planned],
    out: Path,
    *,
    is_weak_sandbox_allowed: bool = False,
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The result of every task, also in OUT/TASK/result.json; a task that is done there is not run again.

    `Settings` apply as in the native evaluation, except that a task file's own shots hold unless num_shots is set.
    All tasks are loaded before the first forward. Raises DareError for a task that does not exist or cannot be loaded,
    for one that would run the model's programs without isolation, and for several samples of a document.
    """
    # Its index of all its tasks takes seconds, and only tasks of its own need it.
    manager = TaskManager(include_defaults=any(not _is_ours(item.task) for item in planned))
    jobs = [_prepare(item, backend, manager, is_weak_sandbox_allowed) for item in planned]
    results = {}
    for job in jobs:
        settings = job.planned.settings
        asked = {
            "task": job.name,
            "settings": lasting(settings),
            "is_chat": job.is_chat,
            "facts": job.planned.facts,
            "inputs_sha256": job.inputs,
        }
        results[job.name] = run_once(
            result_folder(out, job.name),
            _HARNESS,
            asked,
            backend.describe(),
            partial(_evaluate, job, backend, manager),
        )
        if on_result is not None:
            on_result(job.name, results[job.name])
    return results


def _is_ours(name: str) -> bool:
    return name.startswith(OWN) or name.endswith(_FILES)


def _prepare(planned: Planned, backend: Backend, manager: TaskManager, is_weak_allowed: bool) -> _Job:
    name, settings = planned.task, planned.settings
    if settings.num_samples > 1:
        raise DareError(
            "lm-eval judges one completion of a document",
            where="task.num_samples",
            got=settings.num_samples,
            fix="leave it out, or use the native evaluation",
        )
    if name.startswith(OWN):
        benchmark = find_benchmark(name.removeprefix(OWN))
        if isinstance(benchmark, ProgramBenchmark):
            benchmark.sandbox = Sandbox(is_weak_allowed=is_weak_allowed)
        style = settings.style
        if style == "auto":
            style = backend.default_style() if settings.method == "generate" else "text"
        task, data = benchmark_task(benchmark, settings, style, name), benchmark.data_path()
        return _Job(name, planned, task, style == "chat", [] if data is None else [hash_file(data)])
    files = _check_exists(name, manager)
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise DareError(
            f"lm-eval cannot load the task {name}",
            got=f"{type(error).__name__}: {error}",
            fix="without a network, give a task file with `dataset_path: json`, or a task of ours: dare_gsm8k",
        ) from error
    unsafe = [task for task, value in loaded["tasks"].items() if value.config.unsafe_code]
    if unsafe:
        raise DareError(
            "lm-eval would run the model's programs without isolation",
            where=unsafe[0],
            fix="use dare_humaneval or dare_mbpp, which run them in the sandbox",
        )
    return _Job(name, planned, name, settings.style == "chat", [hash_file(file) for file in files])


def _check_exists(name: str, manager: TaskManager) -> list[Path]:
    """The files that a task file names, itself included; none for a task of lm-eval."""
    if name.endswith(_FILES):
        path = Path(name)
        if not path.is_file():
            raise DareError("the task file is not there", where=name)
        return [path, *_data_files(path)]
    if name not in manager.all_tasks:
        own = [OWN + benchmark for benchmark in BENCHMARKS]
        error = unknown_name("task", name, [*manager.all_tasks, *own], where="--tasks")
        error.details["expected"] = f"one of lm-eval's {len(manager.all_tasks)} tasks, a task file, or {', '.join(own)}"
        raise error
    return []


def _data_files(path: Path) -> list[Path]:
    """A missing data file would be reported from deep inside `datasets`, as a pattern that matches nothing."""
    try:
        # Tags such as !function are lm-eval's; only plain data is looked at here.
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DareError("the task file is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(config, dict) or "task" not in config:
        raise DareError("a task file is a mapping with the key task", where=str(path))
    files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    found = []
    for value in files.values() if isinstance(files, dict) else [files]:
        for file in value if isinstance(value, list) else [value]:
            if "://" in str(file) or any(mark in str(file) for mark in "*?["):
                continue
            if not Path(file).is_file():
                raise DareError("the data file of the task is not there", where=str(path), got=file)
            found.append(Path(file))
    return found


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML in which unknown tags are None."""


_PlainLoader.add_multi_constructor("", lambda loader, suffix, node: None)


def _evaluate(job: _Job, backend: Backend, manager: TaskManager) -> Outcome:
    settings = job.planned.settings
    chosen = settings.model_fields_set
    answered = lm_eval.simple_evaluate(
        model=DareLM(
            backend,
            decode=settings.decode.model_dump(exclude_unset=True),
            likelihood=settings.likelihood.model_dump(),
            seed=settings.seed,
        ),
        tasks=[job.task],
        num_fewshot=settings.num_shots if "num_shots" in chosen and not job.name.startswith(OWN) else None,
        limit=settings.limit,
        apply_chat_template=job.is_chat,
        task_manager=manager,
        random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    records = [{"task": task, **sample} for task, samples in answered["samples"].items() for sample in samples]
    num_documents = sum(count["effective"] for count in answered["n-samples"].values())
    details = {
        name: answered[name]
        for name in ("results", "groups", "configs", "versions", "n-shot", "task_hashes")
        if name in answered
    }
    return Outcome(_scores(answered["results"]), num_documents, records, details)


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every number that is a metric; the name of the task in front where there are several."""
    scores = {}
    for task, row in results.items():
        for name, value in row.items():
            metric, comma, chosen = name.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                label = metric if chosen == "none" else f"{metric} ({chosen})"
                scores[label if len(results) == 1 else f"{task} {label}"] = float(value)
    return scores
