"""Rows that end at different times: the engine on a ragged workload, on an equal one, and in static batches.

python benchmarks/rollout_ragged.py            # SDAR shape, block 4, 8 rows at a time; CPU seconds, one thread

Ragged: prompts of 68 to 128 tokens; with random weights a row ends after the block that holds one of many "EOS" tokens.
Equal: the same prompts, every completion as long as the mean of the ragged ones.
Static: the ragged workload the way static batches run it, every row to the full length. It is the same engine, so this
says what leaving early is worth and nothing else; no more than longest / mean length.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import NamedTuple

import torch

from dare.bench.rollout import Shape
from dare.core.decode import Decode
from dare.core.rng import Key
from dare.families.base import Family
from dare.rollout.engine import denoise

BLOCK_LENGTH = 4


class Rates(NamedTuple):
    """Tokens per CPU second of the three workloads, and the lengths of the ragged one."""

    ragged: float
    equal: float
    static: float
    lengths: list[int]


def ragged_rates(*, num: int, capacity: int, length: int, num_repeats: int) -> Rates:
    """`num` rows, `capacity` at a time, at most `length` tokens each."""
    decode = Decode(gen_length=length, block_length=BLOCK_LENGTH, temperature=1.0, batch_size=capacity)
    shape = Shape("sdar", num_kv_heads=4, vocab_size=8192, num_prompts=num)
    family = shape.build(decode, torch.float32)
    # One token in forty ends a row: lengths are spread from one block to the longest.
    family.spec = dataclasses.replace(family.spec, eos_ids=tuple(range(0, shape.vocab_size - 3, 40)))
    prompts = [prompt[: shape.prompt_length - 4 * (row % 16)] for row, prompt in enumerate(shape.prompts(num))]
    ragged_s, lengths = _seconds(family, prompts, decode, num_repeats)
    full = decode.model_copy(update={"eos_stop": False})
    static_s, _ = _seconds(family, prompts, full, num_repeats)
    mean = max(1, round(sum(lengths) / num / BLOCK_LENGTH)) * BLOCK_LENGTH
    equal_s, equal_lengths = _seconds(family, prompts, full.model_copy(update={"gen_length": mean}), num_repeats)
    return Rates(sum(lengths) / ragged_s, sum(equal_lengths) / equal_s, sum(lengths) / static_s, lengths)


def _seconds(family: Family, prompts: list[list[int]], decode: Decode, num_repeats: int) -> tuple[float, list[int]]:
    """CPU seconds of the fastest run, and sampled positions per row."""
    best = float("inf")
    for _ in range(num_repeats):
        start = time.process_time()
        trace = denoise(family, prompts, decode, Key(0), list(range(len(prompts))))
        best = min(best, time.process_time() - start)
    return best, (trace.step_map_BS >= 0).sum(-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=32, help="prompts")
    parser.add_argument("--capacity", type=int, default=8, help="rows at a time")
    parser.add_argument("--length", type=int, default=128, help="longest completion, tokens")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = ragged_rates(
        num=arguments.num, capacity=arguments.capacity, length=arguments.length, num_repeats=arguments.repeats
    )
    lengths = rates.lengths
    print(f"{len(lengths)} rows, {arguments.capacity} at a time, {min(lengths)} to {max(lengths)} tokens, ", end="")
    print(f"mean {sum(lengths) / len(lengths):.1f}")
    print(f"ragged {rates.ragged:.1f} tokens/s, equal {rates.equal:.1f}, static {rates.static:.1f}")
    print(f"ragged / equal {rates.ragged / rates.equal:.2f}, ragged / static {rates.ragged / rates.static:.2f}")


if __name__ == "__main__":
    main()
