"""Scoring that trusts its input, such as sympy's, in a process of its own.

The child gets an empty environment, a limit on memory and, per request, one on CPU time: the kernel ends it when that
is used up, whatever it is doing. CPU time, not wall time, so that a busy machine changes no score. An audit hook, which
cannot be removed, refuses to write files and to start processes or connections. This stops accidents; it is no jail for
an attacker, for whom there is `dare.sandbox`.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

_WALL_SECONDS = 60.0  # for a scorer that sleeps, and for the start
_MEMORY_BYTES = 4 << 30

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "resource.", "fcntl.", "pty.", "signal.")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")


class Child:
    """`python -m MODULE`, started at the first request and again after a request that ended it."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def send(self, request: Any) -> None:
        """Put a request, plain data, to the child."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def receive(self) -> Any:
        """The child's next reply; None if it ended or had to be ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        is_ready, _, _ = select.select([self._process.stdout], [], [], _WALL_SECONDS)
        line = self._process.stdout.readline() if is_ready else b""
        if not line:
            self.close()
            return None
        return json.loads(line)

    def close(self) -> None:
        """End the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        return subprocess.Popen(
            [sys.executable, "-B", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            bufsize=0,  # or a reply could wait in a buffer that `select` does not see
            start_new_session=True,
        )


class Requests:
    """The child's side. To be made after all imports, which may set environment variables."""

    def __init__(self) -> None:
        self._requests, self._replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a scorer prints is no reply
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        sys.addaudithook(_refuse)

    def __iter__(self) -> Iterator[Any]:
        for line in self._requests:
            yield json.loads(line)

    def reply(self, value: Any) -> None:
        print(json.dumps(value), file=self._replies, flush=True)


def limit_cpu(seconds: float) -> None:
    """End this process after so much CPU time from now; 0 takes the limit away."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Reading is allowed, for modules and data files. The events are those of PEP 578."""
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS
    if is_write or (event.startswith(_REFUSED) and event not in _ALLOWED):
        raise PermissionError(f"{event} in a scorer")
