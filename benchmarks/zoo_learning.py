"""Whether every algorithm learns: held-out solve rates before and after, from one fine-tuned checkpoint per family.

    python benchmarks/zoo_learning.py --seeds 0 1 2 --out runs/zoo
    python benchmarks/zoo_learning.py --only bgpo --families llada     # some rows; --write-only: just the page

Trains recipes/tiny/FAMILY_sft.yaml and cuts it at step 200, where there is room for more, then runs every recipe with
every seed, one thread each. Resumes what is unfinished, and several of these may work on one folder. After each run it
writes benchmarks/results/zoo_learning (.jsonl, .md, .svg) from what the run folders hold. Notes on the page are kept:
everything from the line `## Notes` on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from dare.core.registry import resolve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FAMILIES = ["llada", "sdar"]
SFT_STEP = 200
STEPS = 30
WINDOW = 5  # steps per point of a curve


def recipes(family: str) -> list[str]:
    """Stems of the family's recipes that train on rewards, by algorithm."""
    found = {}
    for path in (ROOT / "recipes" / "tiny").glob(f"{family}_*.yaml"):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        is_online = resolve("algorithms", recipe["algorithm"]["name"]).kind == "online"
        if "path" in recipe["model"] and is_online:
            found[path.stem] = recipe["algorithm"]["name"]
    return sorted(found, key=lambda stem: found[stem])


def train(stem: str, out: Path, *overrides: str) -> None:
    """Run a recipe to its end, at low priority on one thread, unless that has been done or is being done by another."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        status = out / "run.json"
        if not (status.is_file() and json.loads(status.read_text())["status"] == "finished"):
            run(stem, out, overrides)


def run(stem: str, out: Path, overrides: tuple[str, ...]) -> None:
    command = ["nice", sys.executable, "-m", "dare.cli", "train", str(ROOT / "recipes" / "tiny" / f"{stem}.yaml")]
    command += [*overrides, "--out", str(out), *(["--resume"] if (out / "recipe.yaml").exists() else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{stem} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(stem: str, seed: int, run: Path) -> dict[str, Any]:
    """What a finished run learnt: held-out counts, and the solve rate of its own samples along the way."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    first, *_, last = read_lines(run / "eval.jsonl")
    rates = [line["solve_rate"] for line in read_lines(run / "metrics.jsonl")]
    windows = [rates[start : start + WINDOW] for start in range(0, len(rates), WINDOW)]
    return {
        "recipe": stem,
        "algorithm": recipe["algorithm"]["name"],
        "seed": seed,
        "steps": recipe["train"]["steps"],
        "samples_per_step": recipe["train"]["prompts_per_step"] * recipe["train"]["completions_per_prompt"],
        "decode": decoding(recipe),
        "num": first["num"],
        "before": first["num_solved"],
        "after": last["num_solved"],
        "seconds": json.loads((run / "run.json").read_text())["seconds"],
        "train_curve": [round(sum(window) / len(window), 4) for window in windows],
    }


def decoding(recipe: dict[str, Any]) -> str:
    """How completions of a recipe are decoded, in words."""
    decode, temperature = recipe["decode"], recipe["evaluation"]["temperature"]
    block = decode["block_length"]
    steps = decode["steps_per_block"] or block
    remask = "" if decode["remask"] == "none" else f", {decode['remask']}"
    greedy = "greedy" if temperature == 0 else f"sampled at {temperature:g}"
    return f"{decode['unmask']}, {block} in {steps}{remask}, {greedy}"


def z_score(rows: list[dict[str, Any]]) -> float:
    """Two-proportion z of the pooled seeds' gain."""
    num = sum(int(row["num"]) for row in rows)
    before, after = (sum(int(row[key]) for row in rows) / num for key in ("before", "after"))
    pooled = (before + after) / 2
    return (after - before) / math.sqrt(max(2 * pooled * (1 - pooled) / num, 1e-12))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line per recipe, its seeds beside one another."""
    lines = [
        "| recipe | decoding | before | after, by seed | mean gain | z | seconds |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for stem in dict.fromkeys(row["recipe"] for row in rows):
        own = sorted((row for row in rows if row["recipe"] == stem), key=lambda row: row["seed"])
        percent = {key: [100 * row[key] / row["num"] for row in own] for key in ("before", "after")}
        before = sorted({f"{value:.1f}" for value in percent["before"]})
        after = ", ".join(f"{row['seed']}: {value:.1f}" for row, value in zip(own, percent["after"], strict=True))
        gain = sum(percent["after"]) / len(own) - sum(percent["before"]) / len(own)
        seconds = " ".join(f"{row['seconds']:.0f}" for row in own)
        lines.append(
            f"| `{stem}` | {own[0]['decode']} | {' / '.join(before)} % | {after} | {gain:+.1f} | {z_score(own):.1f} "
            f"| {seconds} |"
        )
    return lines


def picture(rows: list[dict[str, Any]]) -> str:
    """SVG, one small plot per recipe: solve rate of the samples of `WINDOW` steps, a line per seed."""
    stems = list(dict.fromkeys(row["recipe"] for row in rows))
    width, height, columns = 190, 120, 5
    colors = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#6cc5b0")
    parts = []
    for place, stem in enumerate(stems):
        left, top = place % columns * width, place // columns * height
        parts.append(f'<g transform="translate({left},{top})"><text x="28" y="14">{stem}</text>')
        parts += [
            f'<line x1="28" x2="{width - 8}" y1="{level_y}" y2="{level_y}" class="grid"/>'
            f'<text x="2" y="{level_y + 3:.0f}" class="tick">{level} %</text>'
            for level, level_y in ((0, height - 16), (50, (height - 16 + 22) / 2), (100, 22))
        ]
        for row in (row for row in rows if row["recipe"] == stem):
            curve = row["train_curve"]
            points = " ".join(
                f"{28 + (width - 36) * index / max(len(curve) - 1, 1):.1f},{height - 16 - (height - 38) * rate:.1f}"
                for index, rate in enumerate(curve)
            )
            color = colors[row["seed"] % len(colors)]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append("</g>")
    total = math.ceil(len(stems) / columns) * height
    style = "text{font:11px sans-serif;fill:#333}.tick{font-size:8px;fill:#777}.grid{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {total}">'
        f'<rect width="100%" height="100%" fill="white"/><style>{style}</style>{"".join(parts)}</svg>\n'
    )


def finished(out: Path) -> list[tuple[str, int, Path]]:
    """Recipe, seed and folder of every finished run, by family and algorithm."""
    found = []
    for stem in (stem for family in FAMILIES for stem in recipes(family)):
        for run in sorted(out.glob(f"{stem}-[0-9]*")):
            status = run / "run.json"
            if status.is_file() and json.loads(status.read_text())["status"] == "finished":
                found.append((stem, int(run.name.rpartition("-")[2]), run))
    return found


def write(out: Path) -> None:
    """The three result files, from every finished run."""
    rows = [summary(stem, seed, run) for stem, seed, run in finished(out)]
    seeds = sorted({row["seed"] for row in rows})
    page = RESULTS / "zoo_learning.md"
    _, mark, notes = page.read_text(encoding="utf-8").partition("## Notes") if page.is_file() else ("", "", "")
    num = rows[0]["num"] if rows else 0
    lines = [
        "# What the tiny recipes learn",
        "",
        f"`python benchmarks/zoo_learning.py --seeds {' '.join(map(str, seeds))}`: {STEPS} steps of each recipe from "
        f"one checkpoint per family (`recipes/tiny/FAMILY_sft.yaml`, seed 0, cut at step {SFT_STEP}), one thread at "
        "low priority of a shared 2-core CPU, so the seconds include waiting.",
        f"Held-out solve rates on the same {num} problems, decoded as the recipe rolls out. z: two-proportion z-score "
        "of the seeds pooled; above 3 is no accident. The pictures show the solve rate of the training samples.",
        "",
        *table(rows),
        "",
        "![learning curves](zoo_learning.svg)",
        "",
    ]
    page.write_text("\n".join(lines) + mark + notes, encoding="utf-8")
    (RESULTS / "zoo_learning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (RESULTS / "zoo_learning.svg").write_text(picture(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--only", default="", help="recipes whose name contains this text")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "zoo")
    parser.add_argument("--write-only", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    if arguments.write_only:
        write(arguments.out)
        return
    for family in arguments.families:
        sft = arguments.out / f"{family}_sft"
        train(
            f"{family}_sft", sft, f"checkpoint.every={SFT_STEP}", "checkpoint.keep_last=99", "evaluation.at_start=false"
        )
    with ThreadPoolExecutor(arguments.workers) as pool:
        jobs = {}
        for family in arguments.families:
            checkpoint = arguments.out / f"{family}_sft" / "checkpoints" / f"step-{SFT_STEP:06d}"
            common = [
                f"model.path={checkpoint}",
                f"train.steps={arguments.steps}",
                f"evaluation.every={arguments.steps}",
            ]
            for seed in arguments.seeds:
                for stem in (stem for stem in recipes(family) if arguments.only in stem):
                    run = arguments.out / f"{stem}-{seed}"
                    jobs[pool.submit(train, stem, run, f"seed={seed}", *common)] = run.name
        for job in as_completed(jobs):
            job.result()
            write(arguments.out)
            print(f"finished: {jobs[job]}", flush=True)


if __name__ == "__main__":
    main()
