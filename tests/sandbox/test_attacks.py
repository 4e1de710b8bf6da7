"""Nothing that a program does makes it pass, gets it out or leaves something behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dare.sandbox.limits import Limits, Program
from dare.sandbox.run import Sandbox, strongest_level
from tests.sandbox.attacks import EXHAUSTION, FORGERIES, LEAKS, SECRET, SLOW, SURVIVORS, TESTS

pytestmark = pytest.mark.skipif(strongest_level() != "namespaces", reason="this kernel refuses namespaces")
LIMITS = Limits(cpu_seconds=1, wall_seconds=3.0, memory_bytes=256 << 20)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(limits=LIMITS)


def test_there_are_enough_attacks() -> None:
    assert len({**FORGERIES, **EXHAUSTION, **LEAKS, **SURVIVORS}) >= 90


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_fails(name: str, sandbox: Sandbox) -> None:
    assert sandbox.run(Program(FORGERIES[name], TESTS)).status in ("failed", "timeout")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXHAUSTION]
)
def test_exhaustion_is_contained(name: str, sandbox: Sandbox) -> None:
    start = time.monotonic()
    verdict = sandbox.run(Program(EXHAUSTION[name], TESTS))
    assert verdict.status in ("failed", "timeout", "output")
    assert time.monotonic() - start < LIMITS.wall_seconds + 3
    assert len(verdict.output) <= LIMITS.output_bytes


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_leaks(name: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak would be returned: the test asks for anything but the empty text."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    code = LEAKS[name].replace("SECRET_FILE", repr(str(secret)))
    assert sandbox.run(Program(code, "assert f(0) != ''")).status == "failed"
    assert sorted(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize("name", SURVIVORS)
def test_nothing_survives(name: str, sandbox: Sandbox) -> None:
    mark = f"61.{time.monotonic_ns()}"
    before = _children()
    sandbox.run(Program(SURVIVORS[name].replace("MARK", repr(mark)), TESTS))
    assert not any(mark in line for line in _command_lines())
    assert _children() <= before


@pytest.mark.slow
@pytest.mark.parametrize("level", ["seccomp", "rlimits"])
def test_weaker_levels_contain_what_they_can(level: str) -> None:
    with pytest.warns(RuntimeWarning, match="SANDBOX LEVEL"):
        sandbox = Sandbox(limits=LIMITS, level=level, is_weak_allowed=True)  # type: ignore[arg-type]
    for name, code in FORGERIES.items():
        assert sandbox.run(Program(code, TESTS)).status in ("failed", "timeout"), name
    for name in ("memory bomb", "endless loop", "endless output", "sleep", "deep recursion"):
        assert sandbox.run(Program(EXHAUSTION[name], TESTS)).status != "passed", name
    if level == "seccomp":
        for name in ("internet", "loopback", "unix socket", "signal to the parent", "signal to everybody", "mount"):
            assert sandbox.run(Program(LEAKS[name], "assert f(0) != ''")).status == "failed", name
        for name in ("child", "daemon"):
            assert sandbox.run(Program(SURVIVORS[name].replace("MARK", "'1'"), TESTS)).status == "failed", name


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def _command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace"))
        except OSError:
            continue
    return lines
