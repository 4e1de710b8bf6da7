"""Single key presses from a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

_ESCAPES = {
    b"\x1b[D": "left",
    b"\x1b[C": "right",
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[H": "home",
    b"\x1b[F": "end",
}


def read_keys() -> Iterator[str]:
    """Key presses until the end of the input: "left", "right", "up", "down", "home", "end", or the character.

    The terminal is as it was when the iterator is closed, also after an interrupt. POSIX terminals only.
    """
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        while pressed := os.read(descriptor, 8):
            yield _ESCAPES.get(pressed, pressed.decode("utf-8", errors="replace"))
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
