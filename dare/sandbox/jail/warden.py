"""The process between the caller and a program: it builds the jail, starts program and tests, and ends both.

    caller -> warden -+-> tests      user of its own; sees neither the caller nor the verdict's pipe
                      +-> init -> program    pid 1 of a new pid namespace: when it ends, everything in there does

The program is started before anything secret is read: it holds no copy of the tests or of the nonce. The nonce is read
when the program and all that it started have ended, and only the warden has it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from dare.sandbox.jail import kernel
from dare.sandbox.jail.candidate import serve
from dare.sandbox.jail.tester import run_tests
from dare.sandbox.jail.wire import Channel

_exit = os._exit  # a program may replace the original in its own process
_EXIT_CPU = 10
_GRACE_SECONDS = 1.0  # for processes that are ending by themselves


def main() -> None:
    """One program; the request is the first argument, the verdict goes to the pipe that it names."""
    request = json.loads(sys.argv[1])
    try:
        request["number"] = os.getpid()
        is_root = _enter(request)
        kernel.hide_memory()
        status, detail = _supervise(request, is_root)
    except OSError as error:
        status, detail = "refused", str(error)
    verdict = {"nonce": _read_all(request["nonce"]), "status": status, "detail": detail}
    os.write(request["verdict"], json.dumps(verdict).encode())


def _enter(request: dict[str, Any]) -> bool:
    """Apply the level's isolation to this process; returns whether it keeps the rights of a real root."""
    if request["level"] != "namespaces":
        os.chdir(request["root"])
        kernel.adopt_orphans()
        return False
    is_root = kernel.can_change_user()
    kernel.enter_namespaces(request["root"], request["readable"], request["limits"]["scratch_bytes"], is_root=is_root)
    return is_root


def _supervise(request: dict[str, Any], is_root: bool) -> tuple[str, str]:
    """(status, detail) when the program, its children and the tests have ended."""
    deadline = time.monotonic() + request["limits"]["wall_seconds"]
    to_program, to_tests = os.pipe(), os.pipe()
    result_reader, result_writer = os.pipe()

    def test() -> None:
        _drop(request, is_root, uid_offset=1)
        _restrict(request, num_processes=1)
        kernel.hide_memory()
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        spec = json.loads(_read_all(request["tests"]))
        outcome = run_tests(spec["setup"], spec["tests"], spec["names"], Channel(to_tests[0], to_program[1]))
        os.write(result_writer, json.dumps(outcome).encode())

    def run() -> None:
        _run_program(request, is_root, Channel(to_program[0], to_tests[1]))

    # The tests are started first: only processes that are started later go to the new pid namespace.
    tester = _fork(test, keep=(request["tests"], to_tests[0], to_program[1], result_writer))
    if request["level"] == "namespaces":
        kernel.unshare(kernel.CLONE_NEWPID)
    init = _fork(run, keep=(request["code"], to_program[0], to_tests[1]))
    for descriptor in (*to_program, *to_tests, result_writer):
        os.close(descriptor)
    outcome = _wait_for_result(result_reader, request["alive"], deadline)
    init_code = _end(init, _GRACE_SECONDS if outcome is not None else 0.0)
    tester_code = _end(tester, _GRACE_SECONDS if outcome is not None else 0.0)
    _reap()
    if outcome is not None and outcome[0] == "passed":
        return "passed", ""
    if init_code == _EXIT_CPU or tester_code in (-signal.SIGXCPU, _EXIT_CPU):
        return "timeout", "CPU time"
    if outcome is None and time.monotonic() >= deadline:
        return "timeout", "wall time"
    return outcome or ("failed", "the tests ended without a result")


def _run_program(request: dict[str, Any], is_root: bool, channel: Channel) -> None:
    """The body of init: start the program, wait for it and adopt what it leaves behind."""
    os.setsid()
    _drop(request, is_root, uid_offset=0)
    kernel.die_with_parent()
    kernel.adopt_orphans()

    def program() -> None:
        source = _read_all(request["code"])
        os.close(request["code"])
        os.environ.clear()
        del sys.path[0], sys.argv[1:]  # the way to this package, the request
        _restrict(request, request["limits"]["num_processes"])
        serve(source, channel)

    child = _fork(program, keep=None)
    channel.close()
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            _exit(0)
        if pid == child:
            is_cpu = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            _exit(_EXIT_CPU if is_cpu else 0)


def _drop(request: dict[str, Any], is_root: bool, uid_offset: int) -> None:
    if request["level"] == "namespaces":
        kernel.drop_privileges(2 * request["number"] + uid_offset, is_root=is_root)


def _restrict(request: dict[str, Any], num_processes: int) -> None:
    limits, level = request["limits"], request["level"]
    if level != "rlimits":
        kernel.forbid_calls(may_fork=level == "namespaces")
    kernel.limit_resources(
        cpu_seconds=limits["cpu_seconds"],
        memory_bytes=limits["memory_bytes"],
        file_bytes=limits["scratch_bytes"],
        # Warden, tests and init may count as processes of the same user.
        num_processes=num_processes + (3 if level == "namespaces" else limits["num_others"]),
    )


def _fork(body: Callable[[], None], keep: tuple[int, ...] | None) -> int:
    """A child that runs `body` and ends; of the descriptors it has the standard ones and `keep` (None: all)."""
    pid = os.fork()
    if pid:
        return pid
    _become(body, keep)


def _become(body: Callable[[], None], keep: tuple[int, ...] | None) -> NoReturn:
    code = 1
    try:
        if keep is not None:
            low = 3
            for descriptor in sorted(keep):
                os.closerange(low, descriptor)
                low = descriptor + 1
            os.closerange(low, 1024)
            os.dup2(1, 2)
        body()
        code = 0
    finally:
        _exit(code)


def _wait_for_result(reader: int, alive: int, deadline: float) -> tuple[str, str] | None:
    """What the tests say; None at the deadline, if they end without a word or if the caller goes away."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    poll.register(alive, select.POLLHUP)
    data = b""
    while True:
        events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events or any(descriptor == alive for descriptor, _ in events):
            return None
        part = os.read(reader, 1 << 16)
        if part:
            data += part
            continue
        if not data:
            return None
        status, detail = json.loads(data)
        return status, detail


def _end(pid: int, grace: float) -> int:
    """Kill a child and its group after `grace` seconds, and wait for it; its exit code, or minus its signal."""
    end = time.monotonic() + grace
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= end:
            _kill(pid)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.001)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # without a pid namespace, what init left behind
    return os.waitstatus_to_exitcode(status)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap() -> None:
    """Wait for adopted orphans, which have been killed with their group."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass


def _read_all(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    data = bytearray()
    while part := os.read(descriptor, 1 << 16):
        data += part
    return data.decode("utf-8", "surrogatepass")


if __name__ == "__main__":
    main()
