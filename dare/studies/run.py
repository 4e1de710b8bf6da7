"""Running a study: starts, pilots, then every cell in a process of its own. What is done is never done again.

OUT/starts/FAMILY/TASK             the start checkpoint's run
OUT/pilots/FAMILY/TASK/ALGORITHM   a few steps that measure what a step costs (budgets of forwards or seconds)
OUT/runs/FAMILY/TASK/ALGORITHM/seed-N
OUT/recipes, OUT/logs              the recipe and the output of each process
OUT/report                         see `dare.studies.build`
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dare.core.errors import DareError
from dare.core.files import read_json, write_text
from dare.core.recipe import Recipe
from dare.core.yaml_text import load_yaml
from dare.studies.results import step_cost
from dare.studies.study import Cell, Panel, Plan, Unit, fixed_settings, flatten
from dare.training.checkpoint import resolve_model_path

_PILOT_STEPS = 4  # the first is left out: it warms up


@dataclass(frozen=True)
class Job:
    """One process: a recipe and the run folder it fills."""

    name: str
    recipe: Recipe
    out: Path

    def file(self, folder: Path, suffix: str) -> Path:
        """Where the study in `folder` keeps the job's recipe as it was asked for, or its log."""
        return folder / ("recipes" if suffix == ".yaml" else "logs") / f"{self.name.replace('/', '_')}{suffix}"


@dataclass
class Workers:
    """At most `num` training processes at a time. `say` is told in words what happens."""

    folder: Path
    num: int
    say: Callable[[str], None]
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _is_stopping: bool = False

    def run(self, jobs: Sequence[Job]) -> list[str]:
        """Run what is not finished; returns the names of the jobs that failed.

        An interrupt ends all processes; their checkpoints stay, and the next call resumes them.
        """
        waiting = [job for job in jobs if not is_finished(job)]
        if len(waiting) < len(jobs):
            self.say(f"{len(jobs) - len(waiting)} of {len(jobs)} are done already")
        failed: list[str] = []
        with ThreadPoolExecutor(self.num) as pool:
            futures: dict[Future[bool], Job] = {pool.submit(self._train, job): job for job in waiting}
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        job, is_good = futures[future], future.result()
                        self.say(
                            f"[{len(jobs) - len(pending)}/{len(jobs)}] {job.name}: {'done' if is_good else 'FAILED'}"
                        )
                        failed += [] if is_good else [job.name]
            except BaseException:
                self._stop()
                raise
        return failed

    def _train(self, job: Job) -> bool:
        if self._is_stopping:
            return False
        recipe, log = job.file(self.folder, ".yaml"), job.file(self.folder, ".txt")
        for path in (recipe, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, job.recipe.dump_yaml())
        command = [sys.executable, "-m", "dare.cli", "train", str(recipe), "--out", str(job.out), "--resume", "--quiet"]
        threads = str(max(1, (os.cpu_count() or 1) // self.num))
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": threads}
            )
            self._running.add(process)
            process.wait()
            self._running.discard(process)
        return process.returncode == 0 and is_finished(job)

    def _stop(self) -> None:
        self._is_stopping = True
        for process in list(self._running):
            process.terminate()


def run_study(plan: Plan, out: Path, num_workers: int, say: Callable[[str], None]) -> list[Cell]:
    """Run everything that is missing; returns the cells as they were run, with their start and their steps.

    Failed runs are reported, not raised: the report says what is missing. Raises DareError if a start or a pilot fails,
    if `out` holds runs with other settings, or if another process works in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        workers = Workers(out, num_workers, say)
        starts = _train_starts(plan, out, workers)
        cells = resolve_cells(plan, starts, _cost_per_step(plan, starts, out, workers))
        # Seed by seed: what an interrupted study has done can be compared already.
        in_order = sorted(cells, key=lambda cell: plan.study.seeds.index(cell.seed))
        jobs = [Job(cell.name, cell.recipe, cell_folder(out, cell)) for cell in in_order]
        for job in jobs:
            check_settings(job, out)
        say(f"{len(jobs)} runs, {num_workers} at a time")
        failed = workers.run(jobs)
    if failed:
        say(
            f"{len(failed)} runs failed: {', '.join(failed[:5])}; see {out / 'logs'}. The same command tries them again"
        )
    return cells


def cell_folder(out: Path, cell: Cell) -> Path:
    return out / "runs" / cell.panel.family / cell.panel.task / cell.algorithm / f"seed-{cell.seed}"


def resolve_cells(plan: Plan, starts: dict[Panel, str], costs: dict[tuple[Panel, str], float]) -> list[Cell]:
    """The cells with their start checkpoint, as many steps as the budget pays for, and evaluations spread over them.

    costs  what one step costs, in units of the budget. Raises DareError if the budget does not pay for one step.
    """
    found = []
    for cell in plan.cells:
        steps = int(plan.study.budget.amount // costs[cell.panel, cell.algorithm] or 0)
        if steps < 1:
            raise DareError(
                "the budget does not pay for one step",
                where=cell.name,
                got=f"{plan.study.budget.amount:g} {plan.study.budget.unit}",
                expected=f"at least {costs[cell.panel, cell.algorithm]:g}",
                fix="raise the budget, or lower train.prompts_per_step",
            )
        found.append(_resolved(plan, cell, starts[cell.panel], steps))
    return found


def recorded_cells(plan: Plan, out: Path) -> list[Cell]:
    """The cells with start and steps as the study in `out` asked for them; those that have not begun as planned.

    Runs nothing and waits for nobody, so it may be called while another process runs the study. Raises DareError if
    `out` is no folder, or holds runs with other settings.
    """
    if not out.is_dir():
        raise DareError("there is no study here", where=str(out), fix="run it first, without --report")
    found = []
    for cell in plan.cells:
        job = Job(cell.name, cell.recipe, cell_folder(out, cell))
        asked = _settings(job.file(out, ".yaml"))
        start, steps = asked.get("model.path"), asked.get("train.steps")
        if isinstance(start, str) and isinstance(steps, int):
            cell = _resolved(plan, cell, start, steps)
            check_settings(Job(cell.name, cell.recipe, job.out), out)
        found.append(cell)
    return found


def _resolved(plan: Plan, cell: Cell, start: str, steps: int) -> Cell:
    """The cell as it is run: from a checkpoint, for so many steps, with evaluations spread over them."""
    every = max(1, -(-steps // plan.study.num_evaluations))
    recipe = cell.recipe.model_copy(
        update={
            "model": cell.recipe.model.model_copy(update={"path": start}),
            "train": cell.recipe.train.model_copy(update={"steps": steps}),
            "evaluation": cell.recipe.evaluation.model_copy(update={"every": every}),
            "checkpoint": cell.recipe.checkpoint.model_copy(update={"every": every, "keep_last": 1}),
        }
    )
    return Cell(cell.panel, cell.algorithm, cell.seed, recipe)


def is_finished(job: Job) -> bool:
    """Whether the job's run folder says so."""
    status = job.out / "run.json"
    return status.is_file() and read_json(status, "run status").get("status") == "finished"


def check_settings(job: Job, folder: Path) -> None:
    """Raise DareError if the job's folder holds a run with other settings, naming them."""
    found, asked = _settings(job.out / "recipe.yaml"), _settings(job.file(folder, ".yaml"))
    if found:  # a run records what an algorithm made of options that were left open
        found |= {key: value for key, value in asked.items() if key.startswith("algorithm.")}
    wanted = {**fixed_settings(job.recipe), **flatten(job.recipe.model_dump(mode="json", include={"algorithm"}))}
    wanted |= {"seed": job.recipe.seed, "train.steps": job.recipe.train.steps}
    unlike = [
        f"{key}: {found.get(key)!r} there, {value!r} in the study"
        for key, value in wanted.items()
        if key in found and found[key] != value
    ]
    if unlike:
        raise DareError(
            "the folder holds a run with other settings",
            where=str(job.out),
            got="; ".join(unlike),
            fix="give another --out, or remove that run",
        )


def _settings(path: Path) -> dict[str, Any]:
    """The dotted keys of a recipe; none if there is no file or it cannot be read, which `dare train` will say."""
    try:
        data = load_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        data = None
    return flatten(data) if isinstance(data, dict) else {}


def _train_starts(plan: Plan, out: Path, workers: Workers) -> dict[Panel, str]:
    """The checkpoint that every run of a panel starts from."""
    jobs = {
        panel: Job(f"start/{panel.name}", recipe, out / "starts" / panel.family / panel.task)
        for panel, recipe in plan.starts.items()
        if isinstance(recipe, Recipe)
    }
    for job in jobs.values():
        check_settings(job, out)
    failed = workers.run(list(jobs.values())) if jobs else []
    if failed:
        raise DareError("a start checkpoint could not be trained", where=failed[0], fix=f"see {out / 'logs'}")
    given = {panel: str(path) for panel, path in plan.starts.items() if isinstance(path, Path)}
    folders = {panel: str(job.out) for panel, job in jobs.items()} | given
    return {panel: resolve_model_path(folders[panel]) for panel in plan.panels}


def _cost_per_step(plan: Plan, starts: dict[Panel, str], out: Path, workers: Workers) -> dict[tuple[Panel, str], float]:
    """What a step of each algorithm costs: completions are known, the rest is measured in a few steps."""
    unit: Unit = plan.study.budget.unit
    first = {(cell.panel, cell.algorithm): cell for cell in reversed(plan.cells)}
    if unit == "completions":
        return {
            key: float(cell.recipe.train.prompts_per_step * cell.recipe.train.completions_per_prompt)
            for key, cell in first.items()
        }
    jobs = {}
    for (panel, algorithm), cell in first.items():
        recipe = cell.recipe.model_copy(
            update={
                "model": cell.recipe.model.model_copy(update={"path": starts[panel]}),
                "train": cell.recipe.train.model_copy(update={"steps": _PILOT_STEPS}),
                "evaluation": cell.recipe.evaluation.model_copy(update={"num": 1, "at_start": False, "every": None}),
            }
        )
        folder = out / "pilots" / panel.family / panel.task / algorithm
        jobs[panel, algorithm] = Job(f"pilot/{panel.name}/{algorithm}", recipe, folder)
    failed = workers.run(list(jobs.values()))
    if failed:
        raise DareError(
            "a pilot failed, so the cost of a step is not known", where=failed[0], fix=f"see {out / 'logs'}"
        )
    return {key: step_cost(job.out, job.recipe, unit) for key, job in jobs.items()}


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DareError(
                "another process runs a study in this folder", where=str(out), fix="wait for it, or give another --out"
            ) from None
        yield
