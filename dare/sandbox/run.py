"""One executor for all code of models: rewards and benchmarks.

    verdict = Sandbox().run(Program(code="def double(x): return 2 * x", tests="assert double(2) == 4"))

A program gets a fresh interpreter and a jail (`dare.sandbox.jail.warden`). What it returns, prints or exits with
decides nothing: the tests run in another process and see its results as plain data, and a verdict counts only with a
nonce that is read after the program has ended.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from dare.core.errors import DareError
from dare.sandbox.limits import LEVELS, Level, Limits, Program, Verdict

_START = "import sys; sys.path.insert(0, {root!r}); from dare.sandbox.jail.warden import main; main()"
_GRACE_SECONDS = 10.0  # beyond the program's wall time, for a warden that does not answer
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Sandbox:
    """Runs programs at the strongest level of isolation that the kernel allows.

    level  namespaces (the requirement): no network, no files but Python's, no other processes. seccomp: no network, no
           new processes, but the user's files can be read and written. rlimits: limits on resources only
    Raises DareError when made where only a weaker level than namespaces works, unless `is_weak_allowed`; then it warns.
    """

    def __init__(
        self, *, limits: Limits | None = None, is_weak_allowed: bool = False, level: Level | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.level: Level = strongest_level() if level is None else level
        if self.level == "namespaces":
            return
        if not is_weak_allowed:
            raise DareError(
                "this machine cannot isolate programs that a model wrote",
                where="sandbox",
                got=f"level {self.level}: the kernel refuses namespaces",
                expected="level namespaces",
                fix="allow user namespaces, run in a virtual machine, or accept the risk with --allow-weak-sandbox",
            )
        warnings.warn(
            f"SANDBOX LEVEL {self.level.upper()}: programs of the model can read and write your files"
            + (" and use the network" if self.level == "rlimits" else ""),
            RuntimeWarning,
            stacklevel=2,
        )

    def run(self, program: Program) -> Verdict:
        """The verdict about one program; never raises because of what the program does. Blocks until all ended."""
        return _run(program, self.limits, self.level)

    def run_all(self, programs: Sequence[Program], num_workers: int | None = None) -> list[Verdict]:
        """Verdicts in order; at most `num_workers` programs at the same time (default: one per CPU)."""
        with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, programs))


@lru_cache(maxsize=1)
def strongest_level() -> Level:
    """The first of `LEVELS` at which a trivial program passes. Raises DareError if none does."""
    problems = []
    for level in LEVELS:
        try:
            verdict = _run(Program("x = 1", "assert x is not None and True"), Limits(), level)
        except DareError as error:
            problems.append(f"{level}: {error.details['got']}")
            continue
        if verdict.is_passed:
            return level
        problems.append(f"{level}: {verdict.detail}")
    raise DareError("the sandbox does not work here", where="sandbox", got="; ".join(problems), expected="Linux")


def _run(program: Program, limits: Limits, level: Level) -> Verdict:
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="dare_sandbox_", ignore_cleanup_errors=True) as root:
        reader, writer = os.pipe()
        alive_reader, alive_writer = os.pipe()
        tests = json.dumps({"setup": program.setup, "tests": program.tests, "names": program.names})
        files = [_file(text) for text in (program.code, tests, nonce)]
        request = {
            "level": level,
            "root": root,
            "readable": _readable(),
            "limits": {**asdict(limits), "num_others": _num_processes()},
            "code": files[0].fileno(),
            "tests": files[1].fileno(),
            "nonce": files[2].fileno(),
            "verdict": writer,
            "alive": alive_reader,
        }
        try:
            process = _start(request)
        finally:
            os.close(writer)
            os.close(alive_reader)
            for file in files:
                file.close()
        try:
            said, output, is_over = _collect(process, reader, alive_writer, limits)
        except BaseException:  # the caller is interrupted: so is the program
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode == -signal.SIGKILL:
        return Verdict("timeout", "wall time, and the warden did not answer", output)
    return _verdict(said, nonce, output, is_over, level)


def _verdict(said: dict[str, bytes], nonce: str, output: str, is_over: bool, level: Level) -> Verdict:
    try:
        verdict = json.loads(said["verdict"])
    except ValueError:
        detail = said["errors"].decode(errors="replace").strip()[-500:]
        raise DareError("the sandbox itself failed", where="sandbox", got=detail or "no verdict") from None
    if not secrets.compare_digest(str(verdict["nonce"]), nonce):
        raise DareError("the sandbox itself failed", where="sandbox", got="a verdict with another nonce")
    if verdict["status"] == "refused":
        raise DareError("the sandbox cannot be built", where=f"sandbox level {level}", got=verdict["detail"])
    if is_over:
        return Verdict("output", "more output than allowed", output)
    return Verdict(verdict["status"], verdict["detail"], output)


def _start(request: dict[str, Any]) -> subprocess.Popen[bytes]:
    names = ("code", "tests", "nonce", "verdict", "alive")
    return subprocess.Popen(
        [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _START.format(root=_PACKAGE_ROOT), json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[request[name] for name in names],
        env=_environment(),
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """What the interpreter needs to start; the program sees an empty environment. The order of a set is no chance."""
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return {"PYTHONHASHSEED": "0", **({"LD_LIBRARY_PATH": libraries} if libraries else {})}


def _collect(
    process: subprocess.Popen[bytes], reader: int, alive: int, limits: Limits
) -> tuple[dict[str, bytes], str, bool]:
    """Everything the warden says, what the program printed, and whether that was too much; waits for the end of both.

    The output ends only when no process holds it any more, that is when all that the program started have ended.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    streams = {process.stdout.fileno(): "output", process.stderr.fileno(): "errors", reader: "verdict"}
    data = {name: bytearray() for name in streams.values()}
    deadline, is_over, is_alive = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS, False, True
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                os.killpg(process.pid, signal.SIGKILL)
                break
            for key, _ in events:
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fd)
                    continue
                name = streams[key.fd]
                room = (limits.output_bytes if name == "output" else 1 << 20) - len(data[name])
                data[name] += part[: max(room, 0)]
                is_over |= name == "output" and len(part) > room
            if is_over and is_alive:
                os.close(alive)  # the warden ends the program
                is_alive = False
    if is_alive:
        os.close(alive)
    os.close(reader)
    process.stdout.close()
    process.stderr.close()
    process.wait()
    said = {"verdict": bytes(data["verdict"]), "errors": bytes(data["errors"])}
    return said, data["output"].decode(errors="replace"), is_over


def _file(text: str) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it, when the warden has it
    file.write(text.encode("utf-8", "surrogatepass"))
    file.flush()
    return file


@lru_cache(maxsize=1)
def _readable() -> list[str]:
    """Folders that hold Python itself; the standard library is part of what a program may use, packages are not."""
    return sorted({sys.base_prefix, sys.base_exec_prefix} - {"/", "/usr"})


def _num_processes() -> int:
    """Processes and threads on the machine, which a limit without namespaces counts in."""
    load = Path("/proc/loadavg")
    return int(load.read_text().split()[3].partition("/")[2]) if load.is_file() else 1000
