"""SIGINT and SIGTERM as a wish to stop: the run ends at the next place where nothing is lost, within a time limit.

A thread reads the signals from a pipe that Python's C handler writes to, so the time limit and a second signal act
even while the main thread is inside a long operation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from dare.core.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h"


class StopRequest(Exception):
    """Raised in the loop where it may end."""


class StopSignals:
    """Catches the signals while it is entered, but those that are ignored (`nohup`, background jobs of scripts).

    In another thread than the main one it does nothing.

    Outside of `deferred` a signal raises Interrupted where the main thread is. Within, the first one sets `received`
    and starts the clock: after `within_s` seconds, or at a second signal, the process ends with 128 + signal.
    """

    def __init__(self, within_s: float) -> None:
        self.within_s = within_s
        self.received: int | None = None
        self._is_deferred = False
        self._is_over = threading.Event()
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._handle)
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread is None:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, it decides itself where it ends."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        if not self._is_deferred:
            raise Interrupted(signum)

    def _watch(self) -> None:
        num_received = 0
        while content := os.read(self._reading, 16):
            for signum in (number for number in content if number in _SIGNALS):
                num_received += 1
                if num_received > 1:
                    _end_now(signum, "stopped at once by a second signal")
                if self._is_deferred:
                    _say(f"stopping: saves and ends within {self.within_s:g} s; once more ends it at once")
                    threading.Thread(target=self._end_late, args=(signum,), daemon=True).start()

    def _end_late(self, signum: int) -> None:
        if not self._is_over.wait(self.within_s):
            _end_now(signum, f"not saved within {self.within_s:g} s")


def _say(text: str) -> None:
    """To stderr past Python's buffers, whose locks the main thread may hold."""
    with suppress(OSError):  # nobody may be listening any more
        os.write(2, f"\n{text}\n".encode())


def _end_now(signum: int, what: str) -> None:
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    _say(f"{what}; --resume auto continues from the last checkpoint")
    os._exit(128 + signum)
