"""What is run in the sandbox, what it may use, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["namespaces", "seccomp", "rlimits"]
LEVELS: tuple[Level, ...] = ("namespaces", "seccomp", "rlimits")  # strongest first
Status = Literal["passed", "failed", "timeout", "output"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. Time that counts is CPU time, so that a busy machine changes no verdict.

    num_processes  processes and threads at the same time
    scratch_bytes  files in the program's own /tmp
    output_bytes   what it may print
    wall_seconds   for programs that sleep
    """

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    num_processes: int = 16
    scratch_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Program:
    """Code of a model with the tests that decide about it.

    code   not trusted; run once as a module, in a process of its own
    setup  trusted; run before the tests, in their process
    tests  trusted; names that neither they nor `setup` define are those of `code`
    names  names of `code` even where `setup` defines them
    """

    code: str
    tests: str = ""
    setup: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """passed: every test ran to its end. output: more was printed than allowed. `output` is what was printed."""

    status: Status
    detail: str = ""
    output: str = ""

    @property
    def is_passed(self) -> bool:
        return self.status == "passed"
