"""What honest programs can do, and what a verdict says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dare.core.errors import DareError
from dare.sandbox.limits import Limits, Program, Verdict
from dare.sandbox.run import Sandbox, strongest_level

pytestmark = pytest.mark.skipif(strongest_level() != "namespaces", reason="this kernel refuses namespaces")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox()


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2"),
        ("import math, collections, json, re, heapq, itertools, functools\ndef f(): return math.pi", "assert f() > 3"),
        ("def f(x): return x", "for x in (1, -1.5, 'ü', b'\\xff', None, True, 1j, (1,), [2], {3}, {4: (5,)}):\n    assert f(x) == x"),
        ("def f(x): return x", "assert f(float('inf')) == float('inf') and f(2 ** 100) == 2 ** 100"),
        ("def f(x): return x", "assert f((1, 2)) != [1, 2] and f(frozenset({1})) == {1} and f('\\ud800') == '\\ud800'"),
        ("def f():\n  raise ValueError('no')", "try:\n  f()\n  assert False\nexcept ValueError:\n  pass"),
        ("class Node:\n  def __init__(s, v): s.v = v; s.next = None\ndef last(n):\n  while n.next: n = n.next\n  return n.v",
         "a = Node(1)\na.next = Node(2)\nassert last(a) == 2 and a.next.v == 2"),
        ("def f(n):\n  for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]"),
        ("from collections import Counter, OrderedDict, namedtuple\nP = namedtuple('P', 'a b')\n"
         "def f(x): return Counter(x), OrderedDict(a=1), P(1, 2)", "assert f('aa') == ({'a': 2}, {'a': 1}, (1, 2))"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: 'int' = 1", "assert A().x == 1"),
        ("a = object()\ndef f(): return a\ndef g(): return []", "assert f() == f() and f() and not g() and f() != g()"),
        ("LIMIT = 3\ndef f(): return LIMIT", "assert LIMIT == 3 and f() == 3"),
        ("import tempfile\ndef f():\n  with tempfile.TemporaryFile() as t: t.write(b'x')\n  return 1", "assert f() == 1"),
        ("import threading\ndef f():\n  r = []\n  t = threading.Thread(target=r.append, args=(1,)); t.start(); t.join()\n  return r",
         "assert f() == [1]"),
        ("import multiprocessing\ndef f():\n  p = multiprocessing.Process(target=int); p.start(); p.join(); return p.exitcode",
         "assert f() == 0"),
        ("def f(xs): xs.sort(); return xs", "assert f([2, 1]) == [1, 2]"),
        ("print('noise')\ndef f(): print('more'); return 1", "assert f() == 1"),
        ("def f():\n  return 1\nif __name__ == '__main__':\n  raise SystemExit", "assert f() == 1"),
    ],
)  # fmt: skip
def test_honest_programs_pass(code: str, tests: str, sandbox: Sandbox) -> None:
    assert sandbox.run(Program(code, tests)) == Verdict("passed", "", "noise\nmore\n" if "noise" in code else "")


def test_setup_helps_the_tests_and_not_the_program(sandbox: Sandbox) -> None:
    setup = "def helper(x): return 2 * x\ndef f(x):\n  pass\n"
    tests = "assert f(1) == helper(1)"
    assert sandbox.run(Program("def f(x): return 2", tests, setup, names=("f",))).is_passed
    assert not sandbox.run(Program("def f(x): return helper(1)", tests, setup, names=("f",))).is_passed
    assert not sandbox.run(Program("def f(x): return 2", tests, setup)).is_passed  # setup's own f returns None


def test_verdicts_say_why(sandbox: Sandbox) -> None:
    assert "ZeroDivisionError" in sandbox.run(Program("1 / 0", "")).detail
    assert "NameError" in sandbox.run(Program("def f(): return y", "assert f() == 1")).detail
    assert sandbox.run(Program("def f(): return 1", "assert f() == 2, 'not two'")).detail == "AssertionError: not two"
    limits = Limits(cpu_seconds=1, output_bytes=100)
    assert Sandbox(limits=limits).run(Program("while True: pass", "")).status == "timeout"
    printed = Sandbox(limits=limits).run(Program("while True: print('ab')", ""))
    assert printed.status == "output"
    assert len(printed.output) == 100


def test_results_of_many_are_in_order(sandbox: Sandbox) -> None:
    programs = [Program(f"def f(): return {index % 3}", "assert f() == 1") for index in range(9)]
    assert [verdict.is_passed for verdict in sandbox.run_all(programs, 3)] == [False, True, False] * 3


def test_the_order_of_a_set_is_no_chance(sandbox: Sandbox) -> None:
    program = Program("print(list({'a', 'b', 'c', 'd', 'e'}))", "")
    assert len({sandbox.run(program).output for _ in range(3)}) == 1


def test_a_weak_level_must_be_allowed() -> None:
    with pytest.raises(DareError, match="cannot isolate") as caught:
        Sandbox(level="rlimits")
    assert "--allow-weak-sandbox" in str(caught.value)
    with pytest.warns(RuntimeWarning, match="use the network"):
        assert Sandbox(level="rlimits", is_weak_allowed=True).run(Program("x = 1", "assert x is not None")).is_passed


def test_a_jail_that_cannot_be_built_is_no_verdict() -> None:
    with pytest.raises(DareError, match="cannot be built"):
        Sandbox(limits=Limits(scratch_bytes=-1)).run(Program("x = 1", ""))


def test_the_caller_may_die() -> None:
    """The warden ends the program when its caller is killed."""
    code = (
        "import os, signal, threading\n"
        "from dare.sandbox.run import Sandbox\nfrom dare.sandbox.limits import Program\n"
        "threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "Sandbox().run(Program('print(1)\\nwhile True: pass', ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    assert done.returncode == -9  # its pipes are closed: no child held them open until a timeout
