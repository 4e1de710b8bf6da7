"""A benchmark as a task: same documents and scores as the evaluation, and a run that trains on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dare.core.errors import DareError
from dare.core.recipe import TaskChoice, parse_recipe
from dare.core.registry import resolve
from dare.core.text import Reward
from dare.evals.benchmarks.task import BenchmarkTask, BenchmarkTaskOptions
from dare.sandbox.run import strongest_level
from dare.terminal.progress import NullReporter
from dare.training.run import train


def _task(benchmark: str, **options: object) -> BenchmarkTask:
    task = TaskChoice.model_validate({"name": "benchmark", "benchmark": benchmark, **options}).build(0)
    assert isinstance(task, BenchmarkTask)
    return task


def test_splits_are_the_files_and_share_no_problem(data: Path) -> None:
    rows = [{"question": f"What is {n} plus 2?", "answer": f"#### {n + 2}"} for n in (3, 50, 51)]
    (data / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = _task("gsm8k")
    assert (task.size("train"), task.size("eval")) == (2, 9)
    assert task.prompt("train", 0).uid == "gsm8k/train/1"
    assert _task("gsm8k", train_size=1, eval_size=4).size("eval") == 4
    prompt = task.prompt("eval", 5)
    assert prompt.messages is not None
    assert task.reward(prompt, prompt.answer or "") == Reward(
        1.0, True, {"flexible": 1.0, "strict": 1.0, "found/flexible": 1.0, "found/strict": 1.0}
    )
    assert task.reward(prompt, "so 7").parts["strict"] == 0.0
    assert task.reward(prompt, "").value == 0.0
    assert set("What is plus?#") <= set(task.alphabet) | set("#")
    with pytest.raises(DareError, match="no problem gsm8k/eval/9"):
        task.prompt("eval", 9)
    with pytest.raises(DareError, match="unknown split"):
        task.size("test")


def test_what_cannot_be_trained_on_says_so(data: Path) -> None:
    assert _task("sudoku").size("eval") == 1
    with pytest.raises(DareError, match="no training problems"):
        _task("sudoku").size("train")
    with pytest.raises(DareError, match="unknown benchmark"):
        _task("gsm8")
    assert resolve("tasks", "benchmark").Config is BenchmarkTaskOptions


@pytest.mark.skipif(strongest_level() != "namespaces", reason="this kernel refuses namespaces")
def test_a_code_reward_runs_in_the_sandbox(data: Path) -> None:
    task = _task("mbpp", style="text")
    prompt = task.prompt("eval", 0)
    assert task.reward(prompt, "```python\ndef add(a, b): return a + b\n```").is_solved
    assert not task.reward(prompt, "```python\nimport os\ndef add(a, b): os._exit(0)\n```").is_solved
    assert not task.reward(prompt, "assert add(1, 2) == 3").is_solved


def test_a_run_trains_and_validates_on_it(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} plus 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    (data / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(
        {
            "name": "gsm",
            "model": {"path": str(ascii_checkpoints["llada"])},
            "algorithm": "espo",
            "task": {"name": "benchmark", "benchmark": "gsm8k", "style": "text"},
            "decode": {"gen_length": 8, "block_length": 4, "temperature": 1.0},
            "train": {"steps": 1, "prompts_per_step": 2, "completions_per_prompt": 2},
            "evaluation": {"num": 4},
        },
        where="test",
    )
    assert train(recipe, tmp_path / "run", NullReporter())["status"] == "finished"
    line = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    assert line["num"] == 4
    assert "reward/strict" in line
