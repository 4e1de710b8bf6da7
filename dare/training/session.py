"""A run folder: its logs, its place in time, and what happens around the steps of either loop.

recipe.yaml     the resolved recipe: reruns the run
metrics.jsonl   one line per step; free of wall time, so a resumed run continues it bit for bit
timing.jsonl    seconds, tokens/s, TFLOP/s, utilisation (where a peak is known) and peak memory per step
eval.jsonl      held-out evaluations
validation.jsonl  held-out losses
samples.jsonl   completions, for reading
run.json        status, versions, machine
checkpoints/
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.files import JsonLines, read_lines, settle, write_json, write_text
from dare.core.recipe import Recipe
from dare.core.secrets import hide_secrets
from dare.training.checkpoint import BEST_NAME, TrainerState, save_checkpoint, write_checkpoint
from dare.training.resume import Resume, check_same_recipe, choose_checkpoint, lock_folder, require_new_folder
from dare.training.stop import StopRequest, StopSignals
from dare.training.throughput import peak_tflops, utilisation
from dare.training.trackers import Tracker, build_trackers
from dare.training.validation import Standing, is_out_of_patience, standing
from dare.training.watchdog import Watchdog

_LOGS = ("metrics", "timing", "eval", "validation", "samples")


class Reporter(Protocol):
    """What a run tells whoever watches it."""

    def start(self, recipe: Recipe, run_dir: Path, first_step: int, num_steps: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def advance(self, done: int, total: int) -> None: ...
    def step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None: ...
    def samples(self, samples: list[tuple[str, str, dict[str, float]]]) -> None: ...
    def evaluation(self, step: int, result: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


class Session:
    """Opened once per process; `first_step` steps were already done by earlier processes.

    `done_step` is the step whose end weights and logs stand at: there a stop loses nothing. None in between.
    `write_more(folder, step)`, if a loop sets it, adds what the loop has to keep to each checkpoint.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        reporter: Reporter,
        *,
        resume: Resume = "never",
        stop: StopSignals | None = None,
    ) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.reporter = reporter
        self.checkpoints = run_dir / "checkpoints"
        self.place = "start"
        self.write_more: Callable[..., None] | None = None
        self._running_step = 0
        self._stop = stop
        self._open = ExitStack()
        self._timings: dict[str, float] = {}
        self._peak = peak_tflops(recipe.log.peak_tflops)
        self._started = time.perf_counter()
        with ExitStack() as opened:
            self._open_folder(opened, resume)
            self._open = opened.pop_all()

    def _open_folder(self, opened: ExitStack, resume: Resume) -> None:
        """Lock the folder, find where to go on, cut the logs back to it."""
        has_run = (self.run_dir / "recipe.yaml").exists()
        if has_run:
            require_new_folder(self.run_dir, resume)
            check_same_recipe(self.run_dir / "recipe.yaml", self.recipe)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        opened.enter_context(lock_folder(self.run_dir))
        for directory in (self.run_dir, self.checkpoints):
            settle(directory)
        chosen = choose_checkpoint(self.run_dir, resume) if has_run else None
        state = chosen.state if chosen else None
        self.resumed_from = chosen.path if chosen else None
        self.first_step = state.step if state else 0
        self.done_step: int | None = self.first_step
        self._saved_step = self.first_step
        write_text(self.run_dir / "recipe.yaml", hide_secrets(self.recipe.dump_yaml()))
        self.logs = {name: JsonLines(self.run_dir / f"{name}.jsonl") for name in _LOGS}
        for name, log in self.logs.items():
            opened.callback(log.close)
            log.truncate(state.log_bytes.get(name, 0) if state else 0)
        self.validations = read_lines(self.run_dir / "validation.jsonl")
        self.last_step = self.recipe.train.steps
        if is_out_of_patience(self.validations, self.recipe.validation):
            self.last_step = self.first_step
        self.trackers: list[Tracker] = build_trackers(self.recipe, self.run_dir)
        for tracker in self.trackers:
            opened.callback(tracker.close)
        self._write_status("running")
        timeout_s = self.recipe.train.step_timeout_s
        self.watchdog = Watchdog(timeout_s, self.run_dir / "hang.txt", self._record_hang)
        self.reporter.start(self.recipe, self.run_dir, self.first_step, self.recipe.train.steps)
        for warning in chosen.warnings if chosen else ():
            self.reporter.message(f"warning: {warning}")

    def enter(self, name: str) -> None:
        """A part of the current step begins: shown, a sign of life, and where a stop loses nothing the place for it.

        Raises StopRequest if a signal asked for it.
        """
        self.place = f"step {self._running_step}, {name}"
        self.watchdog.beat()
        self._end_if_asked()
        self.reporter.phase(name)

    def advance(self, done: int, total: int) -> None:
        """Part of a phase is done. Raises as `enter`."""
        self.watchdog.beat()
        self._end_if_asked()
        self.reporter.advance(done, total)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the current step and show it. Raises as `enter`."""
        self.enter(name)
        if name == "update":
            self.done_step = None
        start = time.perf_counter()
        yield
        self._timings[f"{name}_s"] = self._timings.get(f"{name}_s", 0.0) + time.perf_counter() - start

    def record_step(self, step: int, metrics: dict[str, float], num_tokens: int) -> None:
        """Log a finished step (1-based). `num_tokens`: completion tokens that it produced or trained on."""
        seconds = sum(self._timings.values())
        timings = {"seconds": seconds, **self._timings, "tokens_per_s": num_tokens / max(seconds, 1e-9)}
        timings |= utilisation(metrics.get("model_tflop"), self._timings.get("update_s", 0.0), self._peak)
        timings["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._timings = {}
        self.logs["metrics"].write({"step": step, **metrics})
        self.logs["timing"].write({"step": step, **timings})
        for tracker in self.trackers:
            tracker.log(step, {**metrics, **{f"time/{name}": value for name, value in timings.items()}})
        self.reporter.step(step, metrics, timings)

    def steps(self) -> Iterator[int]:
        """The steps (1-based) that are left, up to `last_step`, which a validation may bring nearer."""
        step = self.first_step
        while step < self.last_step:
            step += 1
            self._running_step = step
            yield step
            self.done_step = step

    def record_validation(self, step: int, result: dict[str, Any]) -> None:
        """Log a held-out loss; without an improvement for too long, `step` becomes the last one."""
        record = {"step": step, **result}
        self.logs["validation"].write(record)
        self.validations.append(record)
        for tracker in self.trackers:
            tracker.log(step, {f"validation/{name}": value for name, value in result.items()})
        self._timings = {}
        now = self.standing
        if now is None:
            return
        self.reporter.message(
            f"step {step}: validation loss {result['nll_per_token']:.4f} nats per token "
            f"(+-{result['standard_error']:.4f}), lowest {now.best_loss:.4f} at step {now.best_step}"
        )
        if is_out_of_patience(self.validations, self.recipe.validation):
            self.reporter.message(f"step {step}: no improvement in {now.num_since} validations, training ends here")
            self.last_step = step

    @property
    def standing(self) -> Standing | None:
        """The best validation so far; None before the first one."""
        options = self.recipe.validation
        return None if options is None else standing(self.validations, options.min_delta)

    def record_evaluation(self, step: int, result: dict[str, Any], records: list[dict[str, Any]]) -> None:
        self.logs["eval"].write({"step": step, **result})
        self.record_samples(step, records)
        numbers = {f"eval/{name}": value for name, value in result.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(step, numbers)
        self._timings = {}
        self.reporter.evaluation(step, result)

    def record_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.logs["samples"].write({"step": step, **record})

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after `step`."""
        return step == self.last_step or (every is not None and step % every == 0)

    def save(self, step: int, engine: Engine, tokenizer: Any) -> Path:
        self.enter("save")
        state, keep_last = self._state(step), self.recipe.checkpoint.keep_last
        more = None if self.write_more is None else partial(self.write_more, step=step)
        path = save_checkpoint(self.checkpoints, engine, tokenizer, state, keep_last, more)
        self._saved_step = step
        return path

    def save_done(self, engine: Engine, tokenizer: Any) -> int | None:
        """Save the last step that is done, if it is not saved yet; which step the newest checkpoint is of then."""
        if self.done_step is not None and self.done_step > self._saved_step:
            self._stop = None  # asked for and heard
            self.save(self.done_step, engine, tokenizer)
        return self._saved_step or None

    def save_best(self, step: int, engine: Engine, tokenizer: Any) -> Path:
        """Keep the current weights as the best ones, apart from the newest checkpoints."""
        self.enter("save")
        target = self.checkpoints / BEST_NAME
        write_checkpoint(target, engine, tokenizer, self._state(step))
        return target

    def _state(self, step: int) -> TrainerState:
        log_bytes = {name: log.size() for name, log in self.logs.items()}
        return TrainerState(step=step, seed=self.recipe.seed, log_bytes=log_bytes)

    def close(self, status: str, **summary: Any) -> dict[str, Any]:
        """Write the final status, if a failed run's disk lets it, and close the logs; returns the summary."""
        seconds = round(time.perf_counter() - self._started, 1)
        try:
            self._write_status(status, seconds=seconds, **summary)
        except OSError:
            if status != "failed":
                raise
        self._open.close()
        summary = {"status": status, "run_dir": str(self.run_dir), "seconds": seconds, **summary}
        self.reporter.finish(summary)
        return summary

    def _end_if_asked(self) -> None:
        if self._stop is not None and self._stop.received is not None and self.done_step is not None:
            raise StopRequest

    def _record_hang(self, what: str) -> None:
        """Called by the watchdog's thread, after which the process ends."""
        error = DareError(
            "the run hangs",
            where=self.place,
            got=what,
            fix=f"look at the stacks in {self.watchdog.path}; --resume auto continues from the last checkpoint; "
            "set train.step_timeout_s higher for longer steps",
        )
        os.write(2, f"error: {error}\n".encode())
        self._write_status("hung", error=str(error))

    def _write_status(self, status: str, **more: Any) -> None:
        packages = {name: version(name) for name in ("dare-dllm", "torch", "transformers", "peft", "reasoning-gym")}
        machine = {"system": platform.platform(), "cpu_threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            machine["gpu"] = torch.cuda.get_device_name()
        record = {"status": status, "name": self.recipe.name, "seed": self.recipe.seed, "versions": packages}
        record |= {"python": platform.python_version(), "machine": machine, **more}
        shown = {key: hide_secrets(value) if isinstance(value, str) else value for key, value in record.items()}
        write_json(self.run_dir / "run.json", shown)
