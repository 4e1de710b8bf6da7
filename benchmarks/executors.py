"""Seconds per step of the executors on one machine's CPU: the same small run in one process, on a worker, on two.

    VERL_PLATFORM=cpu OMP_NUM_THREADS=1 python benchmarks/executors.py --out /tmp/executors \\
        > benchmarks/results/executors.txt

Needs the extra dare-dllm[verl]. A step is a rollout of 16 completions of 32 tokens and two updates of espo, on a new
llada of 4 layers of width 128. The least of the steps after the first: wall time, and CPU time of this process and all
that it started, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from dare.core.recipe import parse_recipe
from dare.terminal.progress import NullReporter
from dare.training.run import train

PLACES: list[Any] = [
    "local",
    {"name": "verl", "in_process": True},
    {"name": "verl", "num_workers": 1},
    {"name": "verl", "num_workers": 2},
]


class Clock(NullReporter):
    """Seconds at the end of every step: of the wall, and of all processors by this process and its children."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def step(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        used = [process.cpu_times() for process in processes if process.is_running()]
        self.times.append((time.perf_counter(), sum(times.user + times.system for times in used)))

    def least(self) -> tuple[float, float]:
        """Wall and CPU seconds of a step."""
        steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(self.times)]
        return min(wall for wall, _ in steps), min(used for _, used in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{'executor':<28}{'wall s':>10}{'CPU s':>10}{'grad_norm':>14}")
    for index, place in enumerate(PLACES):
        run_dir, clock = arguments.out / str(index), Clock()
        train(recipe_of(place, arguments.steps), run_dir, clock)
        wall, used = clock.least()
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        name = place if isinstance(place, str) else ", ".join(f"{key} {value}" for key, value in place.items())
        print(f"{name.removeprefix('name '):<28}{wall:>10.2f}{used:>10.2f}{last['grad_norm']:>14.6f}", flush=True)


def recipe_of(executor: Any, steps: int) -> Any:
    size = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "mlp_size": 256, "max_length": 128}
    data = {
        "name": "executors",
        "executor": executor,
        "model": {"create": {"family": "llada", **size}},
        "algorithm": "espo",
        "task": "chain_sum",
        "decode": {"gen_length": 32, "block_length": 32, "steps_per_block": 16, "temperature": 1.0},
        "train": {
            "steps": steps,
            "prompts_per_step": 4,
            "completions_per_prompt": 4,
            "updates_per_rollout": 2,
            "micro_batch_views": 16,
        },
        "evaluation": {"num": 4, "at_start": False},
    }
    return parse_recipe(data, where="benchmark")


if __name__ == "__main__":
    main()
