"""The demo's two stages for several seeds and both families: solve rates before and after RL, and wall time.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out runs/seeds

Resumes what is unfinished and writes benchmarks/results/demo_seeds.md. Every number is read back from the run
folders' own logs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_stage(recipe: str, seed: int, out: Path, *more: str) -> dict[str, Any]:
    """Train if it has not been done yet; the run's status file."""
    status = out / "run.json"
    if not status.is_file() or json.loads(status.read_text())["status"] != "finished":
        path = ROOT / "recipes" / "tiny" / f"{recipe}.yaml"
        command = [sys.executable, "-m", "dare.cli", "train", str(path), f"seed={seed}", *more, "--out", str(out)]
        subprocess.run([*command, "--resume"] if out.exists() else command, check=True)
    return dict(json.loads(status.read_text()))


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def rate(evaluation: dict[str, Any]) -> str:
    low, high = 100 * evaluation["low"], 100 * evaluation["high"]
    counts = f"{evaluation['num_solved']}/{evaluation['num']}"
    return f"{counts} = {100 * evaluation['solve_rate']:.1f} % [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=["llada", "sdar"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seeds")
    arguments = parser.parse_args()
    lines = [
        "# The demo for several seeds",
        "",
        f"`python benchmarks/demo_seeds.py --seeds {' '.join(map(str, arguments.seeds))}`, {os.cpu_count()} CPU cores "
        f"({platform.machine()}), Python {platform.python_version()}. Held-out greedy solve rates with 95 % Wilson "
        "intervals. The held-out problems are the same for every seed; training problems, initial weights, masks and "
        "rollouts follow the seed.",
        "",
        "| family | seed | after SFT | after RL | gain | SFT + RL |",
        "|---|---:|---|---|---:|---:|",
    ]
    for family in arguments.families:
        for seed in arguments.seeds:
            folder = arguments.out / f"{family}-{seed}"
            sft = run_stage(f"{family}_sft", seed, folder / "sft")
            rl = run_stage(f"{family}_rl", seed, folder / "rl", f"model.path={folder / 'sft'}")
            first, *_, last = evaluations(folder / "rl")
            gain = 100 * (last["solve_rate"] - first["solve_rate"])
            seconds = f"{sft['seconds']:.0f} s + {rl['seconds']:.0f} s"
            lines.append(f"| {family} | {seed} | {rate(first)} | {rate(last)} | +{gain:.1f} | {seconds} |")
            print(lines[-1], flush=True)
    target = ROOT / "benchmarks" / "results" / "demo_seeds.md"
    target.write_text("\n".join(lines) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
