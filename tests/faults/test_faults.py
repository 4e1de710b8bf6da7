"""Runs that are killed, stopped, starved or lied to continue as if nothing had happened; the whole table is
`benchmarks/crash_matrix.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dare.core.errors import DareError
from dare.core.faults import explain_fault
from dare.core.recipe import parse_recipe
from dare.terminal.progress import NullReporter
from dare.training.resume import lock_folder
from dare.training.run import train
from dare.training.stop import StopSignals
from dare.training.watchdog import EXIT_HUNG
from tests.faults.cases import QUICK, all_cases
from tests.faults.matrix import RECIPES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_matrix_is_large_and_its_names_are_unique() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) >= 60
    assert set(QUICK) <= set(names)


@pytest.mark.slow
def test_quick_part_of_the_crash_matrix() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "crash_matrix.py"), "--quick"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == len(QUICK), done.stdout + done.stderr
    assert done.returncode == 0, "\n".join(row for row in rows if not row.endswith(("| yes |", "| skipped |")))


HANGING = """
import sys, time
from dare.training.watchdog import Watchdog

def wait(is_seen):
    while True:
        time.sleep(0.01)

with Watchdog(0.3, __import__("pathlib").Path(sys.argv[1]), lambda what: print(what, flush=True)) as dog:
    for _ in range(10):
        time.sleep(0.1)
        dog.beat()
    print("alive", flush=True)
    wait(True)
"""


def test_a_hanging_process_leaves_its_stacks(tmp_path: Path) -> None:
    path = tmp_path / "hang.txt"
    done = subprocess.run([sys.executable, "-c", HANGING, str(path)], env=ENVIRONMENT, capture_output=True, timeout=30)
    assert done.returncode == EXIT_HUNG
    assert done.stdout.decode().splitlines() == ["alive", "no sign of life for 0.3 s"]
    assert "in wait" in path.read_text()


def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals(5.0) as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.received is None:
            time.sleep(0.001)
        assert stop.received == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals(5.0) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert stop.received is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPES["rl"], where="test")
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run"), pytest.raises(DareError, match="another process is writing this run"):
        train(recipe, tmp_path / "run", NullReporter())
    assert not list((tmp_path / "run").iterdir())


def test_a_broken_recipe_in_a_run_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(DareError, match="not valid YAML"):
        train(parse_recipe(RECIPES["rl"], where="test"), tmp_path, NullReporter(), is_resumed=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "other"}))
    with pytest.raises(DareError, match="differs"):
        train(parse_recipe(RECIPES["rl"], where="test"), tmp_path, NullReporter(), is_resumed=True)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(28, "No space left on device", "/full"), "no room left"),
        (OSError(30, "Read-only file system"), "no permission"),
        (PermissionError(13, "Permission denied"), "no permission"),
        (OSError(24, "Too many open files"), "operating system"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("a bug"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
        (ValueError("out of memory is what the text says"), None),
    ],
)
def test_faults_of_the_machine_are_told_from_bugs(error: Exception, what: str | None) -> None:
    explained = explain_fault(error, where="step 3, save")
    assert (explained is None) == (what is None)
    if explained is not None:
        assert what is not None
        assert what in explained.what
        assert "step 3, save" in str(explained)
