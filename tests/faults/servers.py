"""A rollout server in a process of its own, which cases kill, stop, or make refuse everything."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dare.families.tokenizer import char_tokenizer
from dare.families.weights import load_family
from tests.conftest import ALPHABET, save_checkpoint
from tests.numerics.rollout_servers import Fault, Running

REFUSE = signal.SIGUSR1  # from now on it answers every request with status 500
_PID = "server.pid"
_PATHS = ("/generate", "/update_weights_from_disk", "/get_model_info", "/get_server_info")
_START_S, _EFFECT_S = 30.0, 0.2


def signal_server(folder: Path, number: int) -> Callable[[], None]:
    """A fault for the process of a run: the server of the case gets a signal."""

    def fault() -> None:
        os.kill(int((folder / _PID).read_text()), number)
        time.sleep(_EFFECT_S)  # until it has had its effect

    return fault


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_checkpoint(folder: Path) -> Path:
    """A tiny block model in the new folder, which is returned."""
    return save_checkpoint(folder, "sdar", char_tokenizer(ALPHABET))


def remote_options(checkpoint: Path, port: int) -> dict[str, Any]:
    """Sections of a recipe. With one request at a time the server's numbers are the same in every run."""
    limits = {"concurrency": 1, "timeout_s": 3.0, "deadline_s": 20.0, "retries": 1, "backoff_s": 0.01}
    urls = [f"http://127.0.0.1:{port}"]
    return {"model": {"path": str(checkpoint)}, "rollout": {"engine": "sglang", "urls": urls, **limits}}


@contextmanager
def serving(checkpoint: Path, port: int, folder: Path) -> Iterator[None]:
    """The server, for the time of the block; `folder` gets its process id. Raises TimeoutError if it does not start."""
    parent = os.getpid()
    child = os.fork()
    if not child:
        _serve(checkpoint, port, parent)
    (folder / _PID).write_text(str(child))
    try:
        _wait_until_it_listens(port)
        yield
    finally:
        os.kill(child, signal.SIGKILL)  # not reaped before here, so the id is still its own
        os.waitpid(child, 0)


def _serve(checkpoint: Path, port: int, parent: int) -> None:
    try:
        server = Running(load_family(checkpoint), port=port)

        def refuse(number: int, frame: object) -> None:
            server.faults.faults = [Fault(path, status=500) for path in _PATHS]

        signal.signal(REFUSE, refuse)
        while os.getppid() == parent:
            time.sleep(0.1)
    finally:
        os._exit(1)


def _wait_until_it_listens(port: int) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"no rollout server on port {port}") from None
            time.sleep(0.05)
