"""The denoising engine against its goals: one table, about four minutes on an idle core.

python benchmarks/rollout_goals.py             # all cases
python benchmarks/rollout_goals.py dual ragged # those whose names begin like this

Width 512, 8 layers, 8 heads, feed-forward 1536, V = 32,768, float32, P = 128, one thread. Seconds are CPU time of the
process, the fastest of two runs of each sampler in turn; the plain sampler is `dare/bench/reference.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

import torch
from rollout_ragged import ragged_rates

from dare.bench.rollout import Shape, measure
from dare.core.decode import Decode

MASKED, BLOCK = Shape("llada"), Shape("sdar", num_kv_heads=4)


class Case(NamedTuple):
    """ratio: how often as fast as the plain sampler (None = do not run it); share: of the measured peak."""

    name: str
    shape: Shape
    num: int
    options: dict[str, Any]
    ratio: float | None = None
    share: float | None = None
    dtype: torch.dtype = torch.float32


ONE_BLOCK = {"gen_length": 32, "block_length": 32}
FOUR_BLOCKS = {"gen_length": 128, "block_length": 32}
CASES = (
    Case("no cache, T=0", MASKED, 1, ONE_BLOCK, 2.2),
    Case("no cache, T=1", MASKED, 1, ONE_BLOCK | {"steps_per_block": 16, "temperature": 1.0}, 3.0),
    Case("prefix, T=0", MASKED, 1, FOUR_BLOCKS | {"cache": "prefix"}, 2.4),
    Case("dual, T=0", MASKED, 1, FOUR_BLOCKS | {"cache": "dual"}, 2.0),
    Case("dual, 8 rows", MASKED, 8, ONE_BLOCK | {"cache": "dual", "steps_per_block": 8}, 3.5),
    Case("block 4, 8 rows, T=1", BLOCK, 8, {"gen_length": 32, "block_length": 4, "temperature": 1.0}, 8.0, 0.45),
    Case("no cache, 8 rows", MASKED, 8, ONE_BLOCK | {"steps_per_block": 8}, None, 0.75),
    Case("no cache, 8 rows, bfloat16", MASKED, 8, ONE_BLOCK | {"steps_per_block": 8}, dtype=torch.bfloat16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; default: everything")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | engine | plain | ratio | goal | share of peak | goal | sampling and bookkeeping | tokens equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    wanted = tuple(arguments.names)
    for case in CASES:
        if not wanted or case.name.startswith(wanted):
            print(_row(case, arguments.repeats), flush=True)
    if not wanted or "ragged".startswith(wanted):
        rates = ragged_rates(num=32, capacity=8, length=64, num_repeats=1)
        print(f"\nragged: {rates.ragged / rates.equal:.2f} of equal lengths (goal 0.85), ", end="")
        print(f"{rates.ragged / rates.static:.2f} times static batches (goal 3)")


def _row(case: Case, num_repeats: int) -> str:
    shape = dataclasses.replace(case.shape, num_prompts=case.num)
    found = measure(
        shape, Decode(**case.options), dtype=case.dtype, num_repeats=num_repeats, has_plain=case.ratio is not None
    )
    overhead = sum(found.seconds_by_part[part] for part in ("sampling", "bookkeeping")) / found.seconds
    cells = [
        case.name,
        f"{found.seconds:.2f} s",
        "" if found.plain_seconds is None else f"{found.plain_seconds:.2f} s",
        "" if found.speedup is None else f"{found.speedup:.2f}",
        "" if case.ratio is None else f"{case.ratio:.1f}",
        f"{found.share_of_peak:.0%}",
        "" if case.share is None else f"{case.share:.0%}",
        f"{overhead:.1%}",
        "" if found.is_equal is None else str(found.is_equal),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
