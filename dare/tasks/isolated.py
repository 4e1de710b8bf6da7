"""reasoning-gym's scorers in a process of their own.

Several of them evaluate the model's text (sympy's parser does), which may run for ever, fill the memory or do worse.
The child gets an empty environment, a limit on memory and, per answer, one on CPU time: the kernel ends it when that is
used up, whatever it is doing, and the answer scores 0. CPU time, not wall time, so that a busy machine changes no
score. An audit hook, which cannot be removed, refuses to write files and to start processes or connections. This stops
accidents; it is no jail for an attacker.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from dare.core.errors import DareError
from dare.tasks.sources import Entry, Source, open_source

_CPU_SECONDS = 2.0  # of one answer
_WALL_SECONDS = 60.0  # for a scorer that sleeps, and for the start
_MEMORY_BYTES = 4 << 30

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "resource.", "fcntl.", "pty.", "signal.")
_ALLOWED = ("os.listdir", "os.scandir", "os.walk")


class IsolatedScorer:
    """Starts the child at the first answer, and again after an answer that ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def score(self, source: Source, index: int, entry: Entry, answer: str) -> float:
        """The official score of `answer` to `entry`, which is problem `index` of `source`, in [0, 1].

        0 if scoring fails. Raises DareError if the child does not start, or finds another problem there: the
        datasets that depend on Python's hash seed, say, cannot be reproduced and are of no use for training.
        """
        self._send({"source": asdict(source), "index": index, "problem": _identity(entry), "answer": answer})
        is_same = self._receive()
        if is_same is None:
            raise DareError("the scorer's process ended before it scored", where=f"reasoning-gym's {source.dataset}")
        if not is_same:
            raise DareError(f"reasoning-gym's {source.dataset} does not reproduce problem {index}")
        score = self._receive()
        return 0.0 if score is None else float(score)

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _send(self, request: dict[str, Any]) -> None:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        self._child = self._child or _start()
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")

    def _receive(self) -> Any:
        """The child's next reply; None if it ended or had to be ended."""
        assert self._child is not None
        assert self._child.stdout is not None
        is_ready, _, _ = select.select([self._child.stdout], [], [], _WALL_SECONDS)
        line = self._child.stdout.readline() if is_ready else b""
        if not line:
            self.close()
            return None
        return json.loads(line)


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-B", "-m", "dare.tasks.isolated"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        bufsize=0,  # or a reply could wait in a buffer that `select` does not see
        start_new_session=True,
    )


def _serve() -> None:
    """The child. One request a line; two replies: whether the problem is the same, and the score."""
    import reasoning_gym  # noqa: F401 - before the hook, because loading it sets environment variables

    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a scorer prints is no reply
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    sys.addaudithook(_refuse)
    for line in requests:
        request = json.loads(line)
        source = Source(**request["source"])
        entry = _entry(source, request["index"])
        print(json.dumps(_identity(entry) == request["problem"]), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        score = _guarded_score(open_source(source), entry, request["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(json.dumps(score), file=replies, flush=True)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Reading is allowed, for modules and data files. The events are those of PEP 578."""
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS
    if is_write or (event.startswith(_REFUSED) and event not in _ALLOWED):
        raise PermissionError(f"{event} in a scorer")


@lru_cache(maxsize=1024)
def _entry(source: Source, index: int) -> Entry:
    entry: Entry = open_source(source)[index]
    return entry


def _identity(entry: Entry) -> list[str]:
    return [str(entry["question"]), str(entry["answer"])]


def _guarded_score(dataset: Any, entry: Entry, answer: str) -> float:
    try:
        score = float(dataset.score_answer(answer, entry))
    except Exception:  # noqa: BLE001 - inside the sandbox: whatever a scorer raises about a text, the text fails
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


if __name__ == "__main__":
    _serve()
