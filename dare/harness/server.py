"""A `dare serve` of one's own, for as long as something else evaluates its model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dare.core.errors import DareError

_DRAIN_S = 60.0


@contextmanager
def served(checkpoint: str, options: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server for a checkpoint on a free port of this machine; `options` are words of `dare serve`.

    The server ends with the block. Raises DareError if it does not start.
    """
    command = [sys.executable, "-m", "dare.cli", "serve", checkpoint, "--port", "0", "--quiet", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            words = [word for word in line.split() if word.startswith("http://")]
            if not words:
                process.kill()
                raise DareError("the server did not start", where=checkpoint, got=(line + process.stderr.read())[-500:])
            yield words[0]
        finally:
            process.terminate()
            try:
                process.communicate(timeout=_DRAIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
