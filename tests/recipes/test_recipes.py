"""Every shipped recipe validates; every tiny recipe trains a few steps and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dare.core.checks import check
from dare.core.recipe import load_recipe
from dare.terminal.progress import NullReporter
from dare.training.run import train

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "_base")
TINY = sorted((RECIPES / "tiny").glob("*.yaml"))
SMALL = [
    "train.steps=2",
    "train.batch_size=8",
    "train.prompts_per_step=3",
    "train.completions_per_prompt=4",
    "evaluation.num=4",
    "evaluation.every=null",
    "optimizer.warmup_steps=0",
    "task.train_size=64",
    "task.eval_size=8",
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recipe_validates(path: Path) -> None:
    check(load_recipe(path))


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_tiny_recipe_trains(path: Path, tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    recipe = load_recipe(path, SMALL)
    if recipe.model.path is not None:
        recipe = load_recipe(path, [*SMALL, f"model.path={tiny_checkpoints[path.stem.split('_')[0]]}"])
    summary = train(recipe, tmp_path / "run", NullReporter())
    assert summary["status"] == "finished"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] >= 0 for line in lines)
    weights = "model.safetensors" if recipe.lora is None else "adapter_model.safetensors"
    assert (Path(summary["checkpoint"]) / weights).is_file()
