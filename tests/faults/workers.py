"""Runs on verl workers, of which one is killed. Ray does not survive a fork, so these commands are processes
of an interpreter that has verl:

python -m tests.faults.workers STRUCK FAULT PLACE TRAIN_ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dare import cli
from tests.faults import places
from tests.faults.places import Place, strike

ROOT = Path(__file__).parents[2]
FAULTS = {"worker killed": signal.SIGKILL}
_EACH = "dare.executors.verl.workers:_OnRay.each"
PLACES = {
    "rollout": Place(_EACH, "step 2, rollout"),
    "update": Place(_EACH, "step 2, update", 2),
    "save": Place(_EACH, "step 2, save"),
}
OPTIONS = {"executor": {"name": "verl", "num_workers": 2, "timeout_s": 15}}
LIMIT_S = 120.0
_ENDED_S = 20.0  # how long workers may outlive a run


def run(python: Path, arguments: list[str], output: Path, fault: tuple[str, str, str] | None) -> int | None:
    """The exit code of `dare ARGUMENTS`, None if it took too long; what it says is in `output`.

    fault  the file that shows that it has struck, a key of FAULTS and one of PLACES; None: none
    """
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-W", "ignore", "-m", "tests.faults.workers", *(fault or ("", "", "")), *arguments]
    with output.open("wb") as file:
        try:
            return subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            return None


def survivors(struck: Path) -> list[int]:
    """Workers of the run that are still there a while after it."""
    end = time.monotonic() + _ENDED_S
    pids = [int(pid) for pid in struck.read_text().split()] if struck.exists() else []
    while alive := [pid for pid in pids if _is_worker(pid)]:
        if time.monotonic() > end:
            return alive
        time.sleep(0.2)
    return []


def _is_worker(pid: int) -> bool:
    try:
        return b"DiffusionWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal_last(number: int) -> Callable[[], None]:
    """A fault: the last worker gets a signal; all of them are written down."""

    def fault() -> None:
        import psutil  # comes with Ray

        children = [child.pid for child in psutil.Process().children(recursive=True)]
        pids = sorted(pid for pid in children if _is_worker(pid))
        places.STRUCK.write_text(" ".join(map(str, pids)))
        os.kill(pids[-1], number)

    return fault


def main() -> None:
    struck, fault, place, *arguments = sys.argv[1:]
    if fault:
        places.STRUCK = Path(struck)
        strike(PLACES[place], _signal_last(FAULTS[fault]))
    cli.app(arguments, prog_name="dare")


if __name__ == "__main__":
    main()
