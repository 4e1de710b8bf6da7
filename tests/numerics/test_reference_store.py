"""Stored reference log-probs: the run is that of a live reference, and damage or another model is noticed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import Recipe, parse_recipe
from dare.terminal.progress import NullReporter
from dare.training.run import train


def recipe_of(model: Path, algorithm: dict[str, Any], *, steps: int = 3, **reference: Any) -> Recipe:
    data = {
        "name": "test",
        "model": {"path": str(model)},
        "algorithm": algorithm,
        "task": {"name": "chain_sum", "train_size": 12, "eval_size": 4},
        "decode": {"gen_length": 8, "block_length": 4, "steps_per_block": 2},
        "data": {"gen_length": 8, "eos": "fill"},
        "train": {"steps": steps, "batch_size": 4},
        "evaluation": {"num": 4, "at_start": False},
        "optimizer": {"lr": 3e-3},
        "reference": reference,
    }
    return parse_recipe(data, where="test")


def run(recipe: Recipe, out: Path, *, is_resumed: bool = False) -> list[dict[str, float]]:
    train(recipe, out, NullReporter(), is_resumed=is_resumed)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["llada", "sdar"])
@pytest.mark.parametrize("name", ["vrpo", "kto"])
def test_a_stored_reference_is_the_live_one(
    family: str, name: str, tmp_path: Path, tiny_checkpoints: dict[str, Path]
) -> None:
    algorithm = {"name": name, "views_per_sample": 2}
    live = run(recipe_of(tiny_checkpoints[family], algorithm), tmp_path / "live")
    path = tmp_path / "reference.sqlite"
    stored = recipe_of(tiny_checkpoints[family], algorithm, mode="stored", path=str(path))
    first = run(stored, tmp_path / "stored")
    written = path.read_bytes()
    again = run(stored, tmp_path / "again")
    assert path.read_bytes() == written  # nothing was scored anew
    assert again == first
    for mine, other in zip(first, live, strict=True):
        assert mine.pop("view_forwards") < other.pop("view_forwards")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    num = sqlite3.connect(path).execute("SELECT COUNT(*) FROM entry").fetchone()[0]
    assert num == 3 * 4 * (2 if name == "vrpo" else 1)  # both sides of four pairs a step, or four completions


def test_an_adapter_with_a_stored_reference(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    """Its log-probs are those of the network with the adapter off; whole models of the checkpoint use the same file."""
    model, path = tiny_checkpoints["llada"], tmp_path / "reference.sqlite"
    algorithm, lora = {"name": "vrpo", "views_per_sample": 2}, LoraRecipe(rank=2)

    def adapted(**reference: Any) -> Recipe:
        return recipe_of(model, algorithm, **reference).model_copy(update={"lora": lora})

    live = run(adapted(), tmp_path / "live")
    stored = run(adapted(mode="stored", path=str(path)), tmp_path / "stored")
    for mine, other in zip(stored, live, strict=True):
        assert mine.pop("view_forwards") < other.pop("view_forwards")
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    written = path.read_bytes()
    run(recipe_of(model, algorithm, mode="stored", path=str(path)), tmp_path / "whole")
    assert path.read_bytes() == written


def test_rows_with_fixed_masks_are_scored_once(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    algorithm = {"name": "vrpo", "views_per_sample": 1, "draws": "row"}
    recipe = recipe_of(tiny_checkpoints["llada"], algorithm, steps=6, mode="stored")
    run(recipe, tmp_path / "run")
    database = sqlite3.connect(tmp_path / "run" / "reference.sqlite")
    assert database.execute("SELECT COUNT(*) FROM entry").fetchone()[0] == 12 * 2  # two epochs of twelve pairs


def test_a_longer_run_than_was_stored_is_refused(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    algorithm = {"name": "dpo"}
    run(recipe_of(tiny_checkpoints["llada"], algorithm, steps=1, mode="stored"), tmp_path / "run")
    with pytest.raises(DareError, match="no stored reference log-probs"):
        longer = recipe_of(tiny_checkpoints["llada"], algorithm, steps=2, mode="stored")
        run(longer, tmp_path / "run", is_resumed=True)


def test_damage_and_other_models_are_noticed(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    model, path = tmp_path / "model", tmp_path / "reference.sqlite"
    shutil.copytree(tiny_checkpoints["llada"], model)
    recipe = recipe_of(model, {"name": "dpo"}, steps=1, mode="stored", path=str(path))
    run(recipe, tmp_path / "first")
    whole = path.read_bytes()

    with sqlite3.connect(path) as database:
        database.execute("UPDATE entry SET logp = zeroblob(length(logp))")
    database.close()
    with pytest.raises(DareError, match="cannot be read") as error:
        run(recipe, tmp_path / "zeroed")
    assert "checksum" in str(error.value)

    path.write_bytes(b"no database" * 100)
    with pytest.raises(DareError, match="cannot be read"):
        run(recipe, tmp_path / "garbage")

    path.write_bytes(whole)
    other = recipe_of(tiny_checkpoints["llada"], {"name": "dpo"}, steps=1, mode="stored", path=str(path))
    with pytest.raises(DareError, match="of another model"):
        run(other, tmp_path / "other")

    weights = load_file(model / "model.safetensors")
    save_file({name: 1.2 * tensor for name, tensor in weights.items()}, model / "model.safetensors")
    with pytest.raises(DareError, match="not those of this model"):
        run(recipe, tmp_path / "changed")


def test_what_stored_log_probs_need(tiny_checkpoints: dict[str, Path]) -> None:
    model = tiny_checkpoints["llada"]
    with pytest.raises(DareError, match="has no reference policy"):
        check(recipe_of(model, {"name": "sft"}, mode="stored"))
    with pytest.raises(DareError, match=r"reference\.path needs reference\.mode: stored"):
        recipe_of(model, {"name": "dpo"}, path="x")
    online = recipe_of(model, {"name": "espo"}, mode="stored").model_copy(update={"data": None})
    with pytest.raises(DareError, match="not known beforehand"):
        check(online)
