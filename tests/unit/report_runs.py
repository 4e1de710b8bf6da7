"""Small run folders, written the way `dare train` leaves them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from dare.evals.intervals import wilson

NASTY = "<script>alert(1)</script>|`$x$`\x1b[31m\u2028\u202e{{ 7*7 }}"


def evaluation(step: int, num_solved: int, num: int = 200, **decode: Any) -> dict[str, Any]:
    low, high = wilson(num_solved, num)
    return {
        "step": step,
        "task": "countdown",
        "split": "eval",
        "num": num,
        "num_solved": num_solved,
        "solve_rate": num_solved / num,
        "low": low,
        "high": high,
        "reward_mean": num_solved / num + 0.1,
        "nfe": 8.0,
        "tokens_per_forward": 1.25,
        "eos_rate": 0.98,
        "truncation_rate": 0.02,
        "decode": {"temperature": 0.0, "gen_length": 16, **decode},
    }


def sample(step: int, uid: int, completion: str, *, is_solved: bool, split: str = "eval") -> dict[str, Any]:
    tokens = list(completion)
    return {
        "step": step,
        "split": split,
        "uid": f"countdown/eval/{uid}",
        "prompt": f"{uid + 2} {uid + 5} 7>22=",
        "completion": completion,
        "reward": 1.0 if is_solved else 0.1,
        "parts": {"correct": float(is_solved), "format": 1.0},
        "is_solved": is_solved,
        "tokens": tokens,
        "step_map": [(5 * index) % max(len(tokens), 1) for index in range(len(tokens))],
        "logp": [-0.1 * index for index in range(len(tokens))],
        "block": [index // 4 for index in range(len(tokens))],
    }


def step_metrics(step: int, num_steps: int) -> dict[str, float]:
    done = step / num_steps
    return {
        "step": step,
        "loss": 0.02 * math.sin(step) + 0.05 * (1 - done),
        "reward": 0.2 + 0.5 * done + 0.05 * math.sin(7 * step),
        "solve_rate": 0.15 + 0.5 * done + 0.06 * math.sin(5 * step),
        "kl": 0.001 * step + 0.002 * abs(math.sin(step)),
        "ratio": 1.0 + 0.01 * math.sin(step),
        "grad_norm": 0.5 + 0.2 * math.sin(3 * step),
        "completion_length": 9.0 - 2 * done,
        "eos_rate": 0.9 + 0.1 * done,
        "truncation_rate": 0.1 - 0.1 * done,
        "zero_variance_groups": 0.3 * done,
        "tokens_per_forward": 1.0 + 0.2 * done,
        "nfe": 8.0,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(path: Path, num_steps: int = 60, *, model_path: str | None = None, status: str = "finished") -> Path:
    """A reinforcement-learning run as `dare train` would leave it."""
    path.mkdir(parents=True)
    model = {"path": model_path} if model_path else {"create": {"family": "llada"}}
    recipe = {
        "name": "tiny-llada-rl",
        "seed": 3,
        "model": model,
        "algorithm": {"name": "espo"},
        "task": {"name": "countdown"},
        "train": {"steps": num_steps},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    info = {
        "status": status,
        "name": "tiny-llada-rl",
        "seconds": 412.3,
        "versions": {"torch": "2.8.0"},
        "machine": {"system": "Linux-6", "cpu_threads": 2},
    }
    (path / "run.json").write_text(json.dumps(info))
    write_lines(path / "metrics.jsonl", [step_metrics(step, num_steps) for step in range(1, num_steps + 1)])
    timing = {"seconds": 3.0, "rollout_s": 1.8, "reward_s": 0.1, "update_s": 1.1, "tokens_per_s": 2100.0}
    write_lines(
        path / "timing.jsonl",
        [{"step": step, **timing, "peak_memory_mb": 900.0} for step in range(1, num_steps + 1)],
    )
    write_lines(
        path / "eval.jsonl",
        [evaluation(step, 27 + 95 * step // num_steps) for step in range(0, num_steps + 1, num_steps // 3)],
    )
    texts = ("(3+5)*7-1", "7*3+1", "2+8*7", "(9-2)*3+1")
    first = [sample(0, uid, "7+7" if uid else NASTY, is_solved=False) for uid in range(4)]
    last = [sample(num_steps, uid, text if uid else NASTY, is_solved=uid != 1) for uid, text in enumerate(texts)]
    write_lines(path / "samples.jsonl", first + last)
    return path


def write_sft(path: Path, num_steps: int = 40) -> Path:
    """A supervised run: a loss, one evaluation at the end, no samples."""
    path.mkdir(parents=True)
    recipe = {
        "name": "tiny-llada-sft",
        "model": {"create": {"family": "llada"}},
        "algorithm": {"name": "sft"},
        "task": {"name": "countdown"},
        "train": {"steps": num_steps},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "run.json").write_text(json.dumps({"status": "finished", "name": "tiny-llada-sft"}))
    write_lines(
        path / "metrics.jsonl",
        [{"step": step, "loss": 3.0 / step + 0.4, "grad_norm": 1.0 / step} for step in range(1, num_steps + 1)],
    )
    write_lines(path / "eval.jsonl", [evaluation(0, 0), evaluation(num_steps, 27)])
    return path
