"""Crash matrix: every fault at every phase, then the same command again; prints and writes a table.

python benchmarks/crash_matrix.py [--only WORD] [--quick] [--out FILE] [--verl-python PATH]

Exit code 1 if a case is not as it has to be.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.faults.cases import QUICK, all_cases  # noqa: E402
from tests.faults.matrix import Matrix, Outcome  # noqa: E402

HEAD = "| fault | command | where | exit | says | good |\n|---|---|---|---|---|---|\n"


def row(outcome: Outcome) -> str:
    """A line of the table."""
    case = outcome.case
    command = f"train ({case.recipe})" if case.verb == "train" else case.verb
    verdict = "skipped" if outcome.is_skipped else "no: " + "; ".join(outcome.problems) if outcome.problems else "yes"
    cells = (case.fault, command, case.place, outcome.code, outcome.message[:100].replace("|", "/"), verdict)
    return "| " + " | ".join(map(str, cells)) + " |"


def counts(outcomes: list[Outcome]) -> str:
    """How many cases there were, and how many of each kind."""
    num_bad = sum(bool(outcome.problems) for outcome in outcomes)
    num_skipped = sum(outcome.is_skipped for outcome in outcomes)
    return f"{len(outcomes)} cases, {num_bad} not as they have to be, {num_skipped} skipped"


def page(outcomes: list[Outcome], seconds: float) -> str:
    """The table in Markdown."""
    return (
        f"# Crash matrix\n\n{counts(outcomes)}; {seconds:.0f} s on {platform.machine()}, Python "
        f"{platform.python_version()}. Written by "
        "`python benchmarks/crash_matrix.py --out benchmarks/results/crash_matrix.md`.\n\n"
        "Good: the exit code and the one message are as stated, no file is half-written, and the same command "
        "afterwards ends with the logs and checkpoints of an uninterrupted run, byte for byte. Damage is done to the "
        "folder of a killed run. A rollout server that was killed, stopped (SIGSTOP) or answers 500 to everything "
        "(refuses) is replaced by a new one at its address before the second command; its url is in the message.\n\n"
        + HEAD
        + "\n".join(map(row, outcomes))
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="the few cases that the tests run")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--verl-python", type=Path, help="interpreter with verl, for cases of lost workers")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if arguments.only in case.name]
    cases = [case for case in cases if not arguments.quick or case.name in QUICK]
    outcomes: list[Outcome] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), arguments.verl_python)
        for case in cases:
            outcomes.append(matrix.run(case))
            print(row(outcomes[-1]), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(page(outcomes, time.monotonic() - start))
    print(counts(outcomes))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
