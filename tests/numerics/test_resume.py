"""Killed with -9 at any point, resumed, and the logs are those of an uninterrupted run, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dare.core.errors import DareError
from dare.core.recipe import parse_recipe
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints, read_state
from dare.training.run import train

KILLER = """
import os, signal, sys
from pathlib import Path
import torch, yaml
from dare.core.recipe import parse_recipe
from dare.terminal.progress import NullReporter
from dare.training.run import train

recipe_file, run_dir, phase, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

class Killer(NullReporter):
    seen = 0
    def phase(self, name):
        if name == phase:
            self.seen += 1
            if self.seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
recipe = parse_recipe(yaml.safe_load(Path(recipe_file).read_text()), where="test")
train(recipe, Path(run_dir), Killer(), is_resumed=True)
"""


def _recipe(checkpoint: Path, algorithm: str, dtype: str = "float32") -> dict[str, Any]:
    online = algorithm != "sft"
    return {
        "name": "resume",
        "seed": 5,
        "model": {"path": str(checkpoint), "dtype": dtype},
        "algorithm": {"name": algorithm},
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 40, "eval_size": 8},
        "decode": {"gen_length": 8, "block_length": 4, "temperature": 1.0 if online else 0.0, "unmask": "max_prob"},
        "train": {
            "steps": 5,
            "batch_size": 6,
            "prompts_per_step": 3,
            "completions_per_prompt": 4,
            "updates_per_rollout": 2 if online else 1,
        },
        "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
        "evaluation": {"every": 2, "num": 8},
        "checkpoint": {"every": 2, "keep_last": 2},
    }


def _logs(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / f"{name}.jsonl").read_bytes() for name in ("metrics", "eval", "samples")}


@pytest.mark.parametrize(
    ("family", "algorithm", "dtype", "phase", "count"),
    [
        ("llada", "espo", "float32", "update", 4),
        ("llada", "sft", "bfloat16", "save", 2),
        ("sdar", "cj_grpo", "float32", "rollout", 1),
        ("sdar", "tracerl_value", "float32", "update", 4),
        ("llada", "dtreerpo", "bfloat16", "update", 5),
        ("llada", "mdpo", "float32", "rollout", 4),
    ],
)
def test_killed_run_continues_bit_for_bit(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str, algorithm: str, dtype: str, phase: str, count: int
) -> None:
    data = _recipe(tiny_checkpoints[family], algorithm, dtype)
    recipe = parse_recipe(data, where="test")
    train(recipe, tmp_path / "whole", NullReporter())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    arguments = [
        sys.executable,
        "-c",
        KILLER,
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "killed"),
        phase,
        str(count),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(arguments, check=False, timeout=120, env=environment).returncode == -signal.SIGKILL
    train(recipe, tmp_path / "killed", NullReporter(), is_resumed=True)
    assert _logs(tmp_path / "killed") == _logs(tmp_path / "whole")
    steps = [json.loads(line) for line in _logs(tmp_path / "whole")["metrics"].splitlines()]
    assert len({step["grad_norm"] for step in steps}) == len(steps)
    last = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed")]
    names = ["config.json", *(str(path.relative_to(last[0])) for path in last[0].rglob("*.safetensors"))]
    assert ("trainer/critic.safetensors" in names) == (algorithm == "tracerl_value")
    for name in names:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


def test_resume_refuses_what_it_cannot_continue(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = _recipe(tiny_checkpoints["llada"], "sft")
    data["train"]["steps"] = 2
    recipe = parse_recipe(data, where="test")
    run_dir = tmp_path / "run"
    train(recipe, run_dir, NullReporter())
    with pytest.raises(DareError, match="already holds a run"):
        train(recipe, run_dir, NullReporter())
    other = parse_recipe({**data, "optimizer": {"lr": 1e-3}}, where="test")
    with pytest.raises(DareError, match="optimizer.lr: 0.01 -> 0.001"):
        train(other, run_dir, NullReporter(), is_resumed=True)
    longer = parse_recipe({**data, "train": {**data["train"], "steps": 3}}, where="test")
    assert train(longer, run_dir, NullReporter(), is_resumed=True)["status"] == "finished"
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3

    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    longest = parse_recipe({**data, "train": {**data["train"], "steps": 4}}, where="test")
    with pytest.raises(DareError, match="damaged"):
        train(longest, run_dir, NullReporter(), is_resumed=True)
    with pytest.raises(DareError, match="no trainer state"):
        read_state(tiny_checkpoints["llada"])


def test_a_run_folder_stands_for_its_newest_checkpoint(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = _recipe(tiny_checkpoints["llada"], "sft")
    data["train"]["steps"] = 1
    train(parse_recipe(data, where="test"), tmp_path / "sft", NullReporter())
    second = {**data, "model": {"path": str(tmp_path / "sft")}}
    summary = train(parse_recipe(second, where="test"), tmp_path / "next", NullReporter())
    assert summary["status"] == "finished"
    resolved = yaml.safe_load((tmp_path / "next" / "recipe.yaml").read_text())
    assert resolved["model"]["path"] == str(tmp_path / "sft" / "checkpoints" / "step-000001")
