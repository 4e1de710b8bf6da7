"""Notices that a run hangs: no sign of life for too long, so its stacks are written down and the process ends."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
_TICK_S = 1.0


class Watchdog:
    """While it is entered, `timeout_s` seconds without a `beat` end the process; None: it never does.

    The stacks of all threads go to the file `path`, then `on_hang` is called with a sentence, and the exit code is 75.
    Seconds are counted in ticks of its own thread, so that a suspended process is not taken for a hanging one. Code
    that hangs without letting any other thread run is ended after twice the time, with the stacks and exit code 1.
    """

    def __init__(self, timeout_s: float | None, path: Path, on_hang: Callable[[str], None]) -> None:
        self.timeout_s = timeout_s
        self.path = path
        self._on_hang = on_hang
        self._is_over = threading.Event()
        self._idle_s = 0.0

    def beat(self) -> None:
        """A sign of life."""
        self._idle_s = 0.0

    def __enter__(self) -> Self:
        self.beat()
        if self.timeout_s is not None:
            self._file = self.path.open("w", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, args=(self.timeout_s,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.timeout_s is None:
            return
        self._is_over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):  # a folder that became read-only: what ended the run is the news
            self.path.unlink()

    def _watch(self, timeout_s: float) -> None:
        tick_s = min(_TICK_S, timeout_s / 4)
        while True:
            faulthandler.dump_traceback_later(2 * timeout_s, exit=True, file=self._file)
            start = time.monotonic()
            if self._is_over.wait(tick_s):
                return
            self._idle_s += min(time.monotonic() - start, 2 * tick_s)
            if self._idle_s >= timeout_s:
                break
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        os.fsync(self._file.fileno())
        self._on_hang(f"no sign of life for {timeout_s:g} s")
        os._exit(EXIT_HUNG)
