"""Reference curves: what shipped recipes reach, for `dare report` to draw beside a run of the same recipe.

    python benchmarks/reference_curves.py llada_tracerl llada_wd1 --start runs/demo/sft --out runs/reference

Trains each recipe with seed 0 on one thread, those that continue a model from the checkpoint `--start` (the run of
recipes/tiny/FAMILY_sft.yaml, seed 0), and writes its held-out evaluations to benchmarks/results/reference/NAME.json.
Resumes what is unfinished.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reference"
SEED = 0
KEYS = ("step", "task", "split", "num", "num_solved", "solve_rate", "low", "high", "reward_mean")
KEYS += ("completion_length", "nfe", "tokens_per_forward", "eos_rate")


def recipe_file(stem: str) -> Path:
    return ROOT / "recipes" / "tiny" / f"{stem}.yaml"


def is_continued(stem: str) -> bool:
    """Whether the recipe starts from a checkpoint."""
    return "path" in yaml.safe_load(recipe_file(stem).read_text())["model"]


def train(stem: str, start: Path, out: Path) -> None:
    """Run the recipe to its end."""
    command = [sys.executable, "-m", "dare.cli", "train", str(recipe_file(stem)), f"seed={SEED}"]
    command += [f"model.path={start}"] if is_continued(stem) else []
    command += ["--out", str(out), "--quiet", *(["--resume"] if out.exists() else [])]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def reference(stem: str, run: Path) -> tuple[str, dict[str, Any]]:
    """The name of the run's recipe, and its reference as `dare.report.reference` reads it."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    info = json.loads((run / "run.json").read_text())
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    sft = f"dare train recipes/tiny/{stem.partition('_')[0]}_sft.yaml seed={SEED}"
    origin = {"made_with": f"dare train recipes/tiny/{stem}.yaml seed={SEED}"}
    if is_continued(stem):
        origin = {"made_with": f"{origin['made_with']} model.path=START", "start": sft}
    return recipe["name"], {
        "label": f"the shipped run, seed {SEED}, one run on a shared 2-core CPU",
        **origin,
        "machine": info["machine"],
        "versions": info["versions"],
        "seconds": info["seconds"],
        "seed": SEED,
        **{key: recipe[key] for key in ("algorithm", "task", "decode")},
        "evaluations": [{key: e[key] for key in KEYS if key in e} for e in evaluations],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="stems of recipes/tiny")
    parser.add_argument("--start", type=Path, default=ROOT / "runs" / "demo" / "sft")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reference")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for stem in arguments.recipes:
        run = arguments.out / stem
        train(stem, arguments.start, run)
        name, record = reference(stem, run)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{stem}: {[e['num_solved'] for e in record['evaluations']]}, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
