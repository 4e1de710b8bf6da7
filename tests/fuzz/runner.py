"""Runs targets: within a time limit for each input, and nothing outside of the folder that the reader was given."""

from __future__ import annotations

import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings

from dare.core.errors import DareError
from tests.fuzz.targets import Target

LIMIT_S = 10.0  # of processor time, for one input


class TooSlow(BaseException):  # no reader may catch it
    pass


def read_once(target: Target, drawn: Any) -> None:
    """Feed one input to a target. Raises whatever the target raises, but for DareError; TooSlow after `LIMIT_S`."""
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "inside"
        folder.mkdir()
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                target.read(drawn, folder)
            except DareError as error:
                str(error)
        others = [path.name for path in Path(outside).iterdir() if path != folder]
        assert not others, f"wrote {others} outside of its folder"


def fuzz(target: Target, num_examples: int, *, is_repeatable: bool) -> None:
    """Raise the shortest failure that hypothesis finds in `num_examples` inputs."""
    options = settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=is_repeatable,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @options
    @given(target.strategy)
    def holds(drawn: Any) -> None:
        read_once(target, drawn)

    holds()


@contextmanager
def _limited() -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
