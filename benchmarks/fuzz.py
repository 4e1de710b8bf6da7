"""Fuzzing: hostile recipes, data, checkpoints, traces and run folders, until the time is over.

python benchmarks/fuzz.py --minutes 5 [--only WORD] [--out FILE]

A finding is an exception that is no DareError, more than 10 seconds of processor time, more than 4 GiB,
or a file outside of the folder. Each is printed once, with the shortest input that hypothesis finds.
Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fuzz import runner  # noqa: E402
from tests.fuzz.targets import TARGETS, Target  # noqa: E402

MEMORY_BYTES = 4 << 30
ROUND = 40  # inputs of one target before the next one has its turn


def finding(target: Target) -> tuple[str, str] | None:
    """Where the target failed in one line, and the whole story; None if it did not."""
    try:
        runner.fuzz(target, ROUND, is_repeatable=False)
    except (Exception, runner.TooSlow) as error:  # noqa: BLE001 - whatever comes is what we look for
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        frames = [frame for frame in traceback.extract_tb(inner.__traceback__) if "/dare/" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of dare"
        return f"{target.name}: {type(inner).__name__} in {place}", "".join(traceback.format_exception(inner))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    targets = [target for target in TARGETS if arguments.only in target.name]
    end = time.monotonic() + 60.0 * arguments.minutes
    num_inputs: Counter[str] = Counter()
    findings: dict[str, int] = {}
    while time.monotonic() < end:
        for target in targets:
            found = finding(target)
            num_inputs[target.name] += ROUND
            if found is not None:
                if found[0] not in findings:
                    print(f"{found[0]}\n{found[1]}", flush=True)
                findings[found[0]] = findings.get(found[0], 0) + 1
            if time.monotonic() >= end:
                break
    rows = "".join(f"| {target.name} | {num_inputs[target.name]} |\n" for target in targets)
    text = f"| target | inputs, about |\n|---|---|\n{rows}\nFindings: {', '.join(findings) or 'none'}.\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(f"# Fuzzing, {arguments.minutes:g} minutes\n\n{text}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
