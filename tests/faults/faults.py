"""What can go wrong with a machine, done to the process that calls it, at the place that calls it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_REAL_TIME = time.time
BALLAST = "ballast"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate_twice() -> None:
    """The second one while nothing moves."""
    os.kill(os.getpid(), signal.SIGTERM)
    timer = threading.Timer(0.2, terminate)
    timer.daemon = True
    timer.start()
    time.sleep(60)


def terminate_and_stall() -> None:
    """Longer than the run may take for saving."""
    terminate()
    time.sleep(60)


def hang() -> None:
    time.sleep(60)


def hang_in_c() -> None:
    """Without giving any other thread a turn: a regular expression that never ends."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def exhaust_python() -> None:
    _limit_memory()
    bytearray(1 << 31)


def exhaust_torch() -> None:
    import torch

    _limit_memory()
    torch.empty(1 << 31, dtype=torch.uint8)


def clock_forward() -> None:
    time.time = lambda: _REAL_TIME() + 86400.0


def clock_back() -> None:
    time.time = lambda: _REAL_TIME() - 86400.0


def fill_disk(volume: Path, left: int = 0) -> Callable[[], None]:
    """Leave `left` bytes, rounded down to pages, on a volume of its own."""

    def fault() -> None:
        descriptor = os.open(volume / BALLAST, os.O_WRONLY | os.O_CREAT)
        free = os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize
        os.posix_fallocate(descriptor, 0, max(free - left, 1))
        os.close(descriptor)

    return fault


def make_read_only(volume: Path) -> Callable[[], None]:
    """Open files stay writable, as on a volume that is mounted anew."""

    def fault() -> None:
        _mount("--bind", str(volume), str(volume))
        _mount("-o", "remount,bind,ro", str(volume))

    return fault


def unmount(volume: Path) -> None:
    subprocess.run(["umount", str(volume)], check=True, capture_output=True)


def own_volume(volume: Path, size: str) -> None:
    """A small file system at `volume` that this process and its children see, and nobody else. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no namespaces of users and mounts")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("-t", "tmpfs", "-o", f"size={size}", "none", str(volume))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.returncode, done.stderr.strip())


def _limit_memory() -> None:
    """A little more address space than is used now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
