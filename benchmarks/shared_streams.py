"""Scoring K views of a sample of a block model: one shared clean stream against K separate two-stream passes.

python benchmarks/shared_streams.py            # a table: tokens and CPU seconds of a forward and backward, by K
"""

from __future__ import annotations

import argparse
import time

import torch

from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt
from dare.families.base import Family
from dare.families.weights import create_family


def tiny_block_model(width: int, num_layers: int, block_length: int) -> Family:
    return create_family(
        "sdar",
        vocab_size=4096,
        hidden_size=width,
        num_layers=num_layers,
        num_heads=4,
        mlp_size=3 * width,
        max_length=2048,
        block_length=block_length,
        mask_id=4095,
        eos_id=4094,
        pad_id=4093,
        seed=0,
    )


def make_samples(family: Family, num: int, length: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4000, (num, length), generator=generator).tolist()
    canvas = family.canvas([row[: length // 4] for row in ids], [row[length // 4 :] for row in ids])
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(num),
        advantage_B=torch.zeros(num),
        group_B=torch.zeros(num, dtype=torch.int64),
        mask_id=family.spec.mask_id,
    )


def seconds(family: Family, views: Views, samples: Samples, num_repeats: int) -> float:
    """CPU seconds of the fastest of several forward and backward passes."""
    canvas, best = samples.canvas.rows(views.sample_R), float("inf")
    for _ in range(num_repeats):
        start = time.process_time()
        family.view_logp(views, canvas).sum().backward()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="canvas length, tokens")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family = tiny_block_model(arguments.width, arguments.layers, block_length=4)
    samples = make_samples(family, 1, arguments.length)
    print(f"1 sample of {arguments.length} tokens, width {arguments.width}, {arguments.layers} layers, fp32, 1 thread")
    print("views  tokens: separate  shared   seconds: separate  shared   speed-up")
    for num_views in (1, 2, 4, 8, 16):
        views = corrupt.exact_count(samples, Key(0), num_views=num_views)
        each = [views.rows(slice(row, row + 1)) for row in range(num_views)]
        separate = sum(seconds(family, view, samples, arguments.repeats) for view in each)
        shared = seconds(family, views, samples, arguments.repeats)
        many, few = arguments.length * 2 * num_views, arguments.length * (num_views + 1)
        print(f"{num_views:>5}  {many:>16}  {few:>6}  {separate:>18.3f}  {shared:>6.3f}  {separate / shared:>9.2f}")


if __name__ == "__main__":
    main()
