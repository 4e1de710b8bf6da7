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

import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.files import JsonLines, read_lines, write_json, write_text
from dare.core.recipe import Recipe
from dare.training.checkpoint import (
    BEST_NAME,
    TrainerState,
    list_checkpoints,
    read_state,
    save_checkpoint,
    write_checkpoint,
)
from dare.training.throughput import peak_tflops, utilisation
from dare.training.trackers import Tracker, build_trackers
from dare.training.validation import Standing, is_out_of_patience, standing

_LOGS = ("metrics", "timing", "eval", "validation", "samples")
_FREE_IN_TRAIN = ("steps", "micro_batch_views", "micro_batch_tokens", "pack_length", "recompute")
_FREE_IN_ROLLOUT = (
    "urls",
    "api_key_env",
    "weights_dir",
    "concurrency",
    "timeout_s",
    "deadline_s",
    "retries",
    "backoff_s",
    "max_gap",
)
_MAY_CHANGE = (
    ("executor",),
    ("log",),
    ("checkpoint",),
    *(("train", key) for key in _FREE_IN_TRAIN),
    *(("rollout", key) for key in _FREE_IN_ROLLOUT),
)


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
    """Opened once per process; `first_step` steps were already done by earlier processes."""

    def __init__(self, recipe: Recipe, run_dir: Path, reporter: Reporter, *, is_resumed: bool) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.reporter = reporter
        self.checkpoints = run_dir / "checkpoints"
        self.resumed_from = self._find_checkpoint(is_resumed)
        state = read_state(self.resumed_from) if self.resumed_from else None
        self.first_step = state.step if state else 0
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "recipe.yaml", recipe.dump_yaml())
        self.logs = {name: JsonLines(run_dir / f"{name}.jsonl") for name in _LOGS}
        for name, log in self.logs.items():
            log.truncate(state.log_bytes.get(name, 0) if state else 0)
        self.validations = read_lines(run_dir / "validation.jsonl")
        self.last_step = recipe.train.steps
        if is_out_of_patience(self.validations, recipe.validation):
            self.last_step = self.first_step
        self.trackers: list[Tracker] = build_trackers(recipe, run_dir)
        self._timings: dict[str, float] = {}
        self._peak = peak_tflops(recipe.log.peak_tflops)
        self._started = time.perf_counter()
        self._write_status("running")
        reporter.start(recipe, run_dir, self.first_step, recipe.train.steps)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the current step and show it."""
        self.reporter.phase(name)
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
            yield step

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

    def save(self, step: int, engine: Engine, tokenizer: Any, write_more: Callable[[Path], None] | None = None) -> Path:
        self.reporter.phase("save")
        keep_last = self.recipe.checkpoint.keep_last
        return save_checkpoint(self.checkpoints, engine, tokenizer, self._state(step), keep_last, write_more)

    def save_best(self, step: int, engine: Engine, tokenizer: Any) -> Path:
        """Keep the current weights as the best ones, apart from the newest checkpoints."""
        self.reporter.phase("save")
        target = self.checkpoints / BEST_NAME
        write_checkpoint(target, engine, tokenizer, self._state(step))
        return target

    def _state(self, step: int) -> TrainerState:
        log_bytes = {name: log.size() for name, log in self.logs.items()}
        return TrainerState(step=step, seed=self.recipe.seed, log_bytes=log_bytes)

    def close(self, status: str, **summary: Any) -> dict[str, Any]:
        """Write the final status and close the logs; returns the summary."""
        seconds = round(time.perf_counter() - self._started, 1)
        self._write_status(status, seconds=seconds, **summary)
        for log in self.logs.values():
            log.close()
        for tracker in self.trackers:
            tracker.close()
        summary = {"status": status, "run_dir": str(self.run_dir), "seconds": seconds, **summary}
        self.reporter.finish(summary)
        return summary

    def _find_checkpoint(self, is_resumed: bool) -> Path | None:
        has_run = (self.run_dir / "recipe.yaml").exists()
        if has_run and not is_resumed:
            raise DareError(
                "the output folder already holds a run",
                where=str(self.run_dir),
                fix="continue it with --resume, or choose another --out",
            )
        if not is_resumed or not has_run:
            return None
        before = yaml.safe_load((self.run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        changed = _differences(_fixed_part(before), _fixed_part(self.recipe.model_dump(mode="json")))
        if changed:
            raise DareError(
                "the recipe differs from the one that this run was started with",
                where=str(self.run_dir / "recipe.yaml"),
                got="; ".join(changed),
                fix="resume with the same recipe, or start a new run with another --out",
            )
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def _write_status(self, status: str, **more: Any) -> None:
        packages = {name: version(name) for name in ("dare-dllm", "torch", "transformers", "peft", "reasoning-gym")}
        machine = {"system": platform.platform(), "cpu_threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            machine["gpu"] = torch.cuda.get_device_name()
        record = {"status": status, "name": self.recipe.name, "seed": self.recipe.seed, "versions": packages}
        write_json(
            self.run_dir / "run.json", {**record, "python": platform.python_version(), "machine": machine, **more}
        )


def _fixed_part(recipe: dict[str, Any]) -> dict[str, Any]:
    """Flat dotted keys of everything that a resumed run may not change."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if path in _MAY_CHANGE:
            return
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        else:
            flat[".".join(path)] = node

    walk(recipe, ())
    return flat


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]
