"""Soak: thousands of tiny reinforcement learning steps with evaluations and saves; memory, open files and speed.

python benchmarks/soak.py [--steps 2000] [--out FILE]

Exit code 1 if the resident memory has grown by more than 2 % after the warm-up (the first quarter), or open files have.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dare.core.recipe import parse_recipe  # noqa: E402
from dare.terminal.progress import NullReporter  # noqa: E402
from dare.training.run import train  # noqa: E402

NUM_WINDOWS = 20
MAX_GROWTH = 0.02


class Meter(NullReporter):
    """Looks at its own process after every step."""

    def __init__(self) -> None:
        self.rss_mb: list[float] = []
        self.num_files: list[int] = []
        self.num_threads: list[int] = []
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []

    def step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss_mb.append(pages * resource.getpagesize() / 2**20)
        self.num_files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - names only
        self.num_threads.append(len(os.listdir("/proc/self/task")))  # noqa: PTH208
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.monotonic())


def recipe(num_steps: int) -> dict[str, object]:
    """The smallest run with everything in it: rollouts, updates, evaluations, samples, traces, saves."""
    model = {"family": "sdar", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "max_length": 32}
    return {
        "name": "soak",
        "model": {"create": {**model, "block_length": 4}},
        "algorithm": "cj_grpo",
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 50, "eval_size": 8},
        "decode": {"gen_length": 4, "block_length": 4, "temperature": 1.0, "unmask": "max_prob"},
        "train": {"steps": num_steps, "prompts_per_step": 2, "completions_per_prompt": 3},
        "optimizer": {"lr": 0.001},
        "evaluation": {"every": 20, "num": 8},
        "checkpoint": {"every": 20, "keep_last": 2},
        "log": {"samples_every": 20, "traces": 1},
    }


def windows(values: Sequence[float]) -> list[float]:
    """The mean of each of `NUM_WINDOWS` equal parts."""
    size = len(values) // NUM_WINDOWS
    return [mean(values[index * size : (index + 1) * size]) for index in range(NUM_WINDOWS)]


def page(meter: Meter, num_steps: int) -> tuple[str, bool]:
    """The curves as a table, and whether memory and open files stayed flat."""
    size = num_steps // NUM_WINDOWS
    memory, files, threads = (
        windows(meter.rss_mb),
        windows(list(map(float, meter.num_files))),
        windows(list(map(float, meter.num_threads))),
    )
    cpu = [meter.cpu_s[min((i + 1) * size, num_steps) - 1] - meter.cpu_s[i * size] for i in range(NUM_WINDOWS)]
    wall = [meter.wall_s[min((i + 1) * size, num_steps) - 1] - meter.wall_s[i * size] for i in range(NUM_WINDOWS)]
    speeds = [(size - 1) / seconds for seconds in cpu]
    first = NUM_WINDOWS // 4
    growth = memory[-1] / memory[first] - 1.0
    is_flat = growth <= MAX_GROWTH and files[-1] <= files[first]
    rows = "".join(
        f"| {(i + 1) * size} | {memory[i]:.1f} | {files[i]:.1f} | {threads[i]:.1f} | {speeds[i]:.1f} "
        f"| {(size - 1) / wall[i]:.1f} |\n"
        for i in range(NUM_WINDOWS)
    )
    text = (
        f"# Soak\n\n{num_steps} steps of reinforcement learning with an evaluation, a trace and a save every 20, "
        f"one thread of {platform.machine()}, torch {torch.__version__}. Written by `python benchmarks/soak.py`.\n\n"
        f"Resident memory from step {(first + 1) * size} to the end: {100 * growth:+.2f} % (at most "
        f"{100 * MAX_GROWTH:g} %). Open files: {files[first]:.1f} to {files[-1]:.1f}. "
        f"Steps per second of processor time, windows after the warm-up: {min(speeds[first:]):.1f} to "
        f"{max(speeds[first:]):.1f}; wall time depends on what else the machine does.\n\n"
        "| up to step | memory, MiB | open files | threads | steps per CPU second | steps per second |\n"
        f"|---|---|---|---|---|---|\n{rows}"
    )
    return text, is_flat


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        train(parse_recipe(recipe(arguments.steps), where="soak"), Path(folder) / "run", meter)
    text, is_flat = page(meter, arguments.steps)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
