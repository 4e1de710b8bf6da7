"""Adapters on sharded weights: the updates of one process, and checkpoints that go from one executor to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dare.core.engine import Engine
from dare.executors.local import LocalEngine
from dare.exports import export
from dare.families.tokenizer import char_tokenizer
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints
from dare.training.run import train
from tests.conftest import ALPHABET, save_checkpoint
from tests.scale.test_workers import check_updates, logs, recipe_of

LORA = {"rank": 3, "alpha": 6.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "sdar_moe", "sdar_moe", char_tokenizer(ALPHABET))


@pytest.fixture(scope="module")
def pair(cluster: None, checkpoint: Path) -> Iterator[tuple[Engine, Engine]]:
    """A mixture, so that stacked experts have adapters too; its reference is the base."""
    recipe = recipe_of(checkpoint, "espo", {"name": "verl", "num_workers": 2}, LORA)
    tokenizer = char_tokenizer(ALPHABET)
    local = LocalEngine.create(recipe, tokenizer, needs_reference=True)
    workers: Engine = recipe.executor.build().create(recipe, tokenizer, needs_reference=True, critic_lr=None)
    yield local, workers
    workers.close()


@pytest.mark.parametrize("algorithm", ["dpo", {"name": "d1", "beta": 0.1}])
def test_updates_and_checkpoints_of_an_adapter(pair: tuple[Engine, Engine], algorithm: Any, tmp_path: Path) -> None:
    """The reference is scored before anything else, with the adapter off; training afterwards still trains it."""
    check_updates(pair, algorithm, tmp_path, num_files=2)


def test_an_adapter_moves_between_executors_and_is_exported(cluster: None, checkpoint: Path, tmp_path: Path) -> None:
    algorithm = {"name": "d1", "beta": 0.1}
    train(recipe_of(checkpoint, algorithm, "local", LORA, steps=4), tmp_path / "stayed", NullReporter())
    places = [{"name": "verl", "num_workers": 2}, "local"]
    for index, executor in enumerate(places):
        recipe = recipe_of(checkpoint, algorithm, executor, LORA, steps=2 * (index + 1))
        train(recipe, tmp_path / "moved", NullReporter(), is_resumed=index > 0)
    for expected, found in zip(logs(tmp_path / "stayed"), logs(tmp_path / "moved"), strict=True):
        for record in (expected, found):
            record.pop("replay_gap", None)
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    first = list_checkpoints(tmp_path / "moved" / "checkpoints")[0]
    assert first.name == "step-000002"
    export(str(first), tmp_path / "merged")
    base = load_file(checkpoint / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)
