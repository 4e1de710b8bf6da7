"""What a training run shows: a live view on a terminal, one line per log interval anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dare.terminal.eta import Eta
from dare.terminal.metrics import labelled, time_split
from dare.terminal.text import duration, number, percent, rate, shorten, visible

if TYPE_CHECKING:
    from dare.core.recipe import Recipe

_VALUE_WIDTH = 9


@contextmanager
def progress_bar(label: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, for as long as the block runs; called with (done, total). Silent off a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class NullReporter:
    """Says nothing."""

    def start(self, recipe: Recipe, run_dir: Path, first_step: int, num_steps: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def advance(self, done: int, total: int) -> None: ...
    def step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None: ...
    def samples(self, samples: list[tuple[str, str, dict[str, float]]]) -> None: ...
    def evaluation(self, step: int, result: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


class ConsoleReporter:
    """Progress with an honest time to the end, metrics, evaluations and samples.

    The time left is the median time of recent steps for the steps to come, plus the measured cost of every
    evaluation and save to come; "at least" says that one of them has not happened yet. `clock` gives seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._log_every = 1
        self._title = ""
        self._step = self._first_step = self._num_steps = 0
        self._eta = Eta(0, None, None)
        self._phase: str | None = None
        self._phase_done: tuple[int, int] | None = None
        self._started = self._phase_started = 0.0
        self._step_seconds = 0.0  # spent so far on the step that is running
        self._is_evaluated = self._is_saved = False
        self._metrics: dict[str, float] = {}
        self._timings: dict[str, float] = {}
        self._evaluations: list[str] = []
        self._samples: list[tuple[str, str, dict[str, float]]] = []

    def start(self, recipe: Recipe, run_dir: Path, first_step: int, num_steps: int) -> None:
        task = f" on {recipe.task.name}" if recipe.task else ""
        self._title = f"{recipe.name}: {recipe.algorithm.name}{task} → {run_dir}"
        self._log_every = recipe.log.every
        self._step = self._first_step = first_step
        self._num_steps = num_steps
        self._eta = Eta(num_steps, recipe.evaluation.every, recipe.checkpoint.every, recipe.task is not None)
        self._started = self._phase_started = self._clock()
        self._print(Text(self._title, style="bold"))
        if first_step:
            self._print(Text(f"resumed after step {first_step} of {num_steps}"))
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def phase(self, name: str) -> None:
        self._end_phase()
        self._phase = name

    def advance(self, done: int, total: int) -> None:
        self._phase_done = (done, total)

    def step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        self._end_phase()
        self._eta.add_step(self._step_seconds)
        self._step_seconds = 0.0
        self._is_evaluated = self._is_saved = False
        self._step, self._metrics, self._timings = step, metrics, timings
        if self._live is None and (step % self._log_every == 0 or step == self._num_steps):
            self._print(Text(self._line(self._time_left())))
        if self._live is not None:
            self._live.refresh()

    def samples(self, samples: list[tuple[str, str, dict[str, float]]]) -> None:
        self._samples = samples
        if self._live is None:
            for sample in samples:
                self._print(_sample_line(sample, self._console.width))

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        self._end_phase()
        self._is_evaluated = True
        line = evaluation_line(step, result)
        self._evaluations.append(line)
        self._print(Text(line, style="bold"))

    def message(self, text: str) -> None:
        self._print(Text(text, style="yellow" if text.startswith("warning") else ""))

    def finish(self, summary: dict[str, Any]) -> None:
        self._end_phase()
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._metrics:
                self._print(Text(self._line()))
        status = summary.get("status", "finished")
        done = f"{status} after step {self._step} of {self._num_steps}, {duration(self._clock() - self._started)}"
        where = f"; model: {summary['checkpoint']}" if "checkpoint" in summary else ""
        self._print(Text(done + where, style="bold green" if status == "finished" else "bold red"))

    def _end_phase(self) -> None:
        """Book the time since the last event on the phase that was running."""
        now = self._clock()
        seconds, self._phase_started = now - self._phase_started, now
        if self._phase == "evaluate":
            self._eta.add_evaluation(seconds)
        elif self._phase == "save":
            self._eta.add_save(seconds)
            self._is_saved = True
        else:
            self._step_seconds += seconds
        self._phase = self._phase_done = None

    def _time_left(self) -> str:
        left = self._eta.remaining(self._step, is_evaluated=self._is_evaluated, is_saved=self._is_saved)
        if left is None:
            return "time left not known yet"
        running = self._step_seconds + self._clock() - self._phase_started
        bound = "at least " if left.is_lower_bound else ""
        return f"{bound}{duration(max(left.seconds - running, 0.0))} left"

    def _line(self, *more: str) -> str:
        width = len(str(self._num_steps))
        metrics = "  ".join(f"{label} {value}" for label, value in labelled(self._metrics, has_others=False))
        return "  |  ".join((f"step {self._step:>{width}}/{self._num_steps}  {metrics}", self._speed(), *more))

    def _speed(self) -> str:
        split = " ".join(f"{phase} {100 * share:.0f}%" for phase, share in time_split(self._timings))
        tokens = f"  {rate(self._timings['tokens_per_s'])} tokens/s" if "tokens_per_s" in self._timings else ""
        return f"{duration(self._timings.get('seconds', 0.0))}: {split}{tokens}"

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress_row()]
        if self._metrics:
            parts += [
                _metric_grid(labelled(self._metrics, has_others=True), self._console.width),
                Text(self._speed(), style="dim"),
            ]
        parts += [_sample_line(sample, self._console.width) for sample in self._samples]
        return Group(*parts)

    def _progress_row(self) -> Table:
        phase = self._phase or ""
        if self._phase_done is not None:
            phase += " {}/{}".format(*self._phase_done)
        row = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(4):
            row.add_column(no_wrap=True)
        elapsed = duration(self._clock() - self._started)
        row.add_row(
            ProgressBar(total=self._num_steps, completed=self._step, width=20),
            f"step {self._step}/{self._num_steps}",
            f"{elapsed} so far, {self._time_left()}",
            phase,
        )
        return row

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal)


def evaluation_line(step: int | None, result: Mapping[str, Any]) -> str:
    """One evaluation in one line: counts, solve rate with its interval, reward, cost."""
    where = "evaluation" if step is None else f"evaluation at step {step}"
    interval = f"[{percent(result['low'])}, {percent(result['high'])}]"
    solved = f"{result['num_solved']}/{result['num']} solved = {percent(result['solve_rate'])} {interval}"
    names = (("reward_mean", "reward"), ("nfe", "NFE"), ("tokens_per_forward", "tokens/forward"))
    numbers = [f"{label} {number(result[name])}" for name, label in names if name in result]
    rates = (("eos_rate", "EOS"), ("truncation_rate", "truncated"))
    numbers += [f"{label} {percent(result[name])}" for name, label in rates if name in result]
    return f"{where}: {result['task']} ({result['split']})  {solved}  " + "  ".join(numbers)


def benchmark_line(task: str, manifest: Mapping[str, Any] | None) -> str:
    """One benchmark in one line: every metric with its interval, cost and what went wrong; None: shards are missing."""
    if manifest is None:
        return f"{task}: this shard is done; the result appears when all shards are"
    scores = [
        f"{name} {percent(score['mean'])} [{percent(score['low'])}, {percent(score['high'])}]"
        for name, score in manifest["scores"].items()
    ]
    cost, counts = manifest["cost"], manifest["counts"]
    extra = [f"{number(cost['tokens_per_forward'])} tokens/forward", f"{number(cost['nfe'])} NFE"] if cost else []
    extra += [f"{counts[name]} {name}" for name in ("truncated", "empty", "problems") if counts.get(name)]
    missing = next(iter(counts.get("not_extracted", {}).values()), 0)
    extra += [f"{missing} without an answer"] if missing else []
    published = manifest["facts"].get("published")
    overridden = " with other settings" if "overridden" in manifest["facts"] else ""
    extra += [f"published {published}{overridden}"] if published is not None else []
    return "  ".join([f"{task}:", *scores, *extra])


def _metric_grid(pairs: list[tuple[str, str]], width: int) -> Table:
    """As many pairs side by side as fit."""
    num_columns = max(1, width // (max(len(label) for label, _ in pairs) + _VALUE_WIDTH + 4))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(num_columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(justify="right", min_width=_VALUE_WIDTH, no_wrap=True)
    for start in range(0, len(pairs), num_columns):
        grid.add_row(*(cell for pair in pairs[start : start + num_columns] for cell in pair))
    return grid


def _sample_line(sample: tuple[str, str, dict[str, float]], width: int) -> Text:
    prompt, completion, parts = sample
    rewards = " ".join(f"{name}={number(value)}" for name, value in parts.items())
    room = max(width - len(rewards) - 7, 20)
    line = Text("  ")
    line.append(shorten(visible(prompt), room // 2), style="dim")
    line.append(" → ")
    line.append(shorten(visible(completion), room - room // 2))
    line.append(f"  {rewards}", style="cyan")
    return line
