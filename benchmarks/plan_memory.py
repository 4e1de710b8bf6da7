"""`dare plan` against what a run really takes: peak resident memory of a process of its own, at three sizes.

    python benchmarks/plan_memory.py             # some minutes; writes benchmarks/results/plan_memory.txt

Each row plans a recipe in one process and trains it for two steps in another, whose peak the kernel reports. "adapter"
is a rank-16 adapter on the medium model that the row before it has trained.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 1 << 20
# hidden size, layers, rows of a step, micro-batch views
SIZES = {
    "small": (256, 6, 16, 16),
    "medium": (512, 6, 16, 4),
    "adapter": (512, 6, 16, 4),
    "large": (768, 8, 8, 8),
}


def recipe(name: str, data: Path) -> dict[str, Any]:
    hidden_size, num_layers, rows, views = SIZES[name]
    create = {
        "family": "llada",
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": hidden_size // 64,
        "mlp_size": hidden_size * 3,
        "max_length": 256,
    }
    model: dict[str, Any] = {"model": {"create": create}}
    if name == "adapter":
        model = {"model": {"path": str(data.parent / "run-medium")}, "lora": {"rank": 16}}
    return {
        "name": f"plan-{name}",
        **model,
        "algorithm": {"name": "sft"},
        "data": {"path": str(data), "eos": "one"},
        "decode": {"gen_length": 32, "block_length": 32},
        "train": {"steps": 2, "batch_size": rows, "micro_batch_views": views},
        "log": {"samples_every": None},
    }


def run(kind: str, name: str, folder: Path) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", kind, "--name", name, "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child(kind: str, name: str, folder: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    options = recipe(name, folder / "rows.jsonl")
    if kind == "plan":
        from dare.core.recipe import parse_recipe
        from dare.training.planning import plan_run

        found = plan_run(parse_recipe(options, where="benchmark"))
        return {"peak": found.memory.peak, "parts": found.memory.parts(), "parameters": found.num_parameters}
    import dare

    dare.train(options, folder / f"run-{name}")
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def write_rows(path: Path) -> None:
    draw = random.Random(0)
    digits = ["".join(draw.choice("0123456789") for _ in range(length)) for length in [60, 100] * 48]
    rows = [
        {"prompt": prompt, "completion": completion} for prompt, completion in zip(*[iter(digits)] * 2, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=["plan", "train"])
    parser.add_argument("--name", choices=list(SIZES))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_memory.txt")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.name, options.folder)))
        return
    lines = [f"{'size':<8}{'parameters':>14}{'planned MiB':>13}{'measured MiB':>14}{'error':>8}"]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl")
        for size in options.sizes:
            planned, measured = run("plan", size, folder), run("train", size, folder)
            error = planned["peak"] / measured["peak"] - 1.0
            lines.append(
                f"{size:<8}{planned['parameters']:>14,}{planned['peak'] / MIB:>13,.0f}{measured['peak'] / MIB:>14,.0f}"
                f"{error:>8.1%}"
            )
            print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
