"""Rows that end at different times: the engine on a ragged workload, on an equal one, and in static batches.

python benchmarks/rollout_ragged.py            # SDAR shape, block 4, 8 rows at a time; CPU seconds, one thread

Ragged: with random weights a row ends after the block that holds one of many "EOS" tokens. Equal: no row ends early.
Static: the ragged workload the way static batches run it, every row to the full length.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from dare.bench.rollout import Shape
from dare.core.decode import Decode
from dare.core.rng import Key
from dare.families.base import Family
from dare.rollout.engine import denoise


def seconds(family: Family, prompts: list[list[int]], decode: Decode, num_repeats: int) -> tuple[float, list[int]]:
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
    decode = Decode(gen_length=arguments.length, temperature=1.0, batch_size=arguments.capacity)
    shape = Shape("sdar", num_kv_heads=4, vocab_size=8192, num_prompts=arguments.num)
    family = shape.build(decode, torch.float32)
    # One token in forty ends a row: lengths are spread from one block to the longest.
    family.spec = dataclasses.replace(family.spec, eos_ids=tuple(range(0, shape.vocab_size - 3, 40)))
    prompts = [
        prompt[: shape.prompt_length - 4 * (row % 16)] for row, prompt in enumerate(shape.prompts(arguments.num))
    ]
    ragged_s, lengths = seconds(family, prompts, decode, arguments.repeats)
    full = decode.model_copy(update={"eos_stop": False})
    static_s, _ = seconds(family, prompts, full, arguments.repeats)
    num = max(arguments.capacity, round(sum(lengths) / arguments.length / arguments.capacity) * arguments.capacity)
    equal_s, equal_lengths = seconds(family, prompts[:num], full, arguments.repeats)
    ragged, equal, static = sum(lengths) / ragged_s, sum(equal_lengths) / equal_s, sum(lengths) / static_s
    print(f"{arguments.num} rows, {arguments.capacity} at a time, lengths {min(lengths)} to {max(lengths)}")
    print(f"ragged {ragged:.1f} tokens/s, equal {equal:.1f}, static {static:.1f}")
    print(f"ragged / equal {ragged / equal:.2f}, ragged / static {ragged / static:.2f}")


if __name__ == "__main__":
    main()
