"""Peak memory of one update with 1 and with 16 views per sample: constant, because one micro-batch's graph is alive.

    python benchmarks/update_memory.py            # one line per case, each measured in a fresh process

`full graph` is the plain alternative: all views in one autograd graph.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

CASES = [("replay", 1), ("replay", 16), ("full graph", 1), ("full graph", 16)]


def measure(mode: str, num_views: int) -> float:
    """Peak resident memory in MiB beyond what the model and its optimizer needed before the update."""
    import torch

    from dare.core.recipe import parse_recipe
    from dare.core.rng import Key
    from dare.data.rows import EncodedRow
    from dare.executors.local import LocalEngine
    from dare.families.weights import create_family
    from dare.training.offline import rows_to_samples
    from dare.training.update import plan_iterations, update

    torch.set_num_threads(1)
    family = create_family(
        "llada",
        vocab_size=8192,
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        mlp_size=768,
        max_length=512,
        mask_id=8191,
        eos_id=8190,
        pad_id=8189,
        seed=0,
    )
    recipe = parse_recipe(
        {
            "name": "memory",
            "model": {"create": {"family": "llada"}},
            "algorithm": {"name": "sft", "views_per_sample": num_views},
            "task": "chain_sum",
            "train": {"micro_batch_views": 1 if mode == "replay" else 10**6},
        },
        where="benchmark",
    )
    engine = LocalEngine(recipe, family, num_updates=10, needs_reference=False)
    algorithm = recipe.algorithm.build()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(4):
        ids = torch.randint(0, 8000, (256,), generator=generator).tolist()
        rows.append(EncodedRow(uid=str(index), prompt_ids=ids[:64], completion_ids=ids[64:], is_scored=[True] * 192))
    samples = rows_to_samples(engine, rows, block_length=None)
    (warm,) = plan_iterations(engine, algorithm, samples, Key(0), 1)
    for parameter in family.network.parameters():  # gradients and moments exist before the measurement
        parameter.grad = torch.zeros_like(parameter)
    engine.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update(engine, algorithm, samples, warm)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode")
    parser.add_argument("--views", type=int)
    arguments = parser.parse_args()
    if arguments.mode:
        print(f"{measure(arguments.mode, arguments.views):.0f}")
        return
    print("4 samples of 256 tokens, width 256, 6 layers, vocabulary 8192, fp32")
    for mode, num_views in CASES:
        command = [sys.executable, __file__, "--mode", mode, "--views", str(num_views)]
        # Blocks above 64 KiB go back to the system when freed, so that resident memory is what is alive.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak = done.stdout.strip()
        print(
            f"{mode:>10}, {num_views:>2} views per sample: {peak:>6} MiB above the state before the update", flush=True
        )


if __name__ == "__main__":
    main()
