"""Seconds per step of the executors on one machine's CPU: the same small run in one process, on a worker, on two.

    VERL_PLATFORM=cpu OMP_NUM_THREADS=1 python benchmarks/executors.py --out /tmp/executors \\
        > benchmarks/results/executors.txt

Needs the extra dare-dllm[verl]. A step is a rollout of 16 completions of 32 tokens, two updates of espo and one
publish, on a new llada of 6 layers of width 256. Medians without the first step, from `timing.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

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
PARTS = ("rollout_s", "reward_s", "update_s", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{'executor':<28}" + "".join(f"{part.removesuffix('_s'):>12}" for part in PARTS) + f"{'reward':>12}")
    for index, place in enumerate(PLACES):
        run_dir = arguments.out / str(index)
        train(recipe_of(place, arguments.steps), run_dir, NullReporter())
        timings = rows(run_dir / "timing.jsonl")[1:]
        reward = rows(run_dir / "metrics.jsonl")[-1]["reward"]
        name = place if isinstance(place, str) else " ".join(f"{value}" for value in place.values())
        cells = "".join(f"{median(row[part] for row in timings):>12.2f}" for part in PARTS)
        print(f"{name:<28}{cells}{reward:>12.4f}", flush=True)


def recipe_of(executor: Any, steps: int) -> Any:
    size = {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "mlp_size": 512, "max_length": 128}
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


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
