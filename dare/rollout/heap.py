"""Freed memory stays with the process while a rollout runs.

Every step frees tensors of some megabytes and asks for equal ones right after. The C library hands such blocks back to
the system and gets fresh pages, each of which faults once: a tenth of the time of a batch of eight rows.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt (malloc.h)
_LARGEST_THRESHOLD = 32 << 20  # glibc takes no larger one; what is larger comes from the system each time
_NEVER = (1 << 31) - 1


@contextmanager
def kept_heap() -> Iterator[None]:
    """Blocks under 32 MiB are reused, not returned. Afterwards the limits are those that glibc grows to by itself.

    Nothing happens under another C library; another allocator may ignore it.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
