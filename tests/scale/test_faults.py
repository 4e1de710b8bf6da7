"""Workers that are killed or hang: one error, no process left behind, and a run that goes on where it was saved."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dare.core.errors import DareError
from dare.families.tokenizer import char_tokenizer
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints
from dare.training.run import train
from tests.conftest import ALPHABET, save_checkpoint
from tests.scale.test_workers import logs, recipe_of, rollout

TWO = {"name": "verl", "num_workers": 2, "timeout_s": 120}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "llada", "llada", char_tokenizer(ALPHABET))


def worker_pids() -> list[int]:
    """Processes of our actors on this test's cluster, which is made of children of this process."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended since
            if "DiffusionWorker" in " ".join(child.cmdline()):
                found.append(child.pid)
    return sorted(found)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while set(pids) & set(worker_pids()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(pids) & set(worker_pids())


class Killer(NullReporter):
    """Kills the last worker a moment after the second phase of a name has begun."""

    def __init__(self, name: str) -> None:
        self.name, self.num_seen = name, 0
        self.killed: list[int] = []

    def phase(self, name: str) -> None:
        self.num_seen += name == self.name
        if name == self.name and self.num_seen == 2:
            self.killed = worker_pids()
            threading.Timer(0.02, os.kill, (self.killed[-1], signal.SIGKILL)).start()


@pytest.mark.parametrize(
    ("phase", "ahead"),
    [("rollout", {}), ("update", {"overlap": "one_step", "correction": "geometric"}), ("save", {})],
)
def test_a_killed_worker_ends_the_run_which_then_continues(
    cluster: None, checkpoint: Path, tmp_path: Path, phase: str, ahead: dict[str, Any]
) -> None:
    """In one process, with the numbers of a run that was never anywhere else."""
    options: dict[str, Any] = {"steps": 3, "prompts_per_step": 6, "completions_per_prompt": 8, **ahead}
    recipe = recipe_of(checkpoint, "espo", TWO, **options)
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})})
    killer = Killer(phase)
    with pytest.raises(DareError, match="a worker died during"):
        train(recipe, tmp_path / "run", killer)
    wait_until_gone(killer.killed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]
    local = recipe.model_copy(update={"executor": recipe_of(checkpoint, "espo").executor})
    train(local, tmp_path / "run", NullReporter(), is_resumed=True)
    train(local, tmp_path / "whole", NullReporter())
    for expected, found in zip(logs(tmp_path / "whole"), logs(tmp_path / "run"), strict=True):
        for record in (expected, found):
            record.pop("replay_gap", None)
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-5)
    assert list_checkpoints(checkpoints)[-1].name == "step-000003"


def test_a_worker_that_hangs_is_named_and_ended(cluster: None, checkpoint: Path) -> None:
    recipe = recipe_of(checkpoint, "espo", {**TWO, "timeout_s": 60})
    tokenizer = char_tokenizer(ALPHABET)
    engine: Any = recipe.executor.build().create(recipe, tokenizer, needs_reference=False, critic_lr=None)
    try:
        rollout(engine)
        pids = worker_pids()
        os.kill(pids[-1], signal.SIGSTOP)
        engine.workers.timeout_s = 3.0
        with pytest.raises(DareError, match="did not finish 'generate' in time") as error:
            rollout(engine)
        assert "after 3 s" in str(error.value)
    finally:
        engine.close()
    wait_until_gone(pids)
