"""Time and peak host memory of loading a synthetic checkpoint of several shards, for a dense and a mixture family.

    python benchmarks/load_memory.py              # writes about 2 GB below the temporary folder, and removes it

The peak must stay under the weights plus one shard: tensors are copied into the finished network one at a time, and
pages of a shard that was read are given back when its file is closed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
# family, then the size of a layer stack that makes about 1 GB in float32
SIZES = {
    "sdar": {"hidden_size": 1024, "num_layers": 16, "num_heads": 8, "mlp_size": 3072, "vocab_size": 32768},
    "llada2": {"hidden_size": 1024, "num_layers": 8, "num_heads": 8, "mlp_size": 2048, "vocab_size": 32768},
}
NUM_SHARDS = 8


def write_checkpoint(name: str, folder: Path) -> tuple[int, int]:
    """A new model in `NUM_SHARDS` files. Returns the bytes of all weights and of the largest shard."""
    from safetensors.torch import load_file, save_file

    from dare.families.weights import create_family, save_family

    sizes = SIZES[name]
    special = {key: sizes["vocab_size"] - 1 - index for index, key in enumerate(("mask_id", "eos_id", "pad_id"))}
    save_family(create_family(name, max_length=4096, seed=0, **sizes, **special), folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    share = sum(tensor.nbytes for tensor in tensors.values()) / NUM_SHARDS
    shards: list[dict[str, object]] = [{} for _ in range(NUM_SHARDS)]
    filled = 0
    for key, tensor in tensors.items():
        shards[min(int(filled / share), NUM_SHARDS - 1)][key] = tensor
        filled += tensor.nbytes
    weight_map = {}
    for index, part in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return filled, max((folder / file).stat().st_size for file in set(weight_map.values()))


def measure(folder: Path, dtype_name: str) -> tuple[float, int]:
    """Seconds to load, and the peak of resident memory beyond that of the code, in bytes."""
    import torch

    from dare.families.weights import create_family, load_family

    torch.set_num_threads(1)
    for name in SIZES:  # a tiny model loads all the code, about 75 MiB of it for the meta device
        tiny = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 16, "vocab_size": 8, "max_length": 8}
        create_family(name, **tiny, mask_id=7, eos_id=6, pad_id=5, seed=0).logits(torch.zeros(1, 4).long())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    family = load_family(folder, getattr(torch, dtype_name))
    seconds = time.perf_counter() - start
    assert family.network.head_weight[0].isfinite().all()
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", nargs=2, metavar=("FAMILY", "FOLDER"))
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "DTYPE"))
    arguments = parser.parse_args()
    if arguments.make:
        print(*write_checkpoint(arguments.make[0], Path(arguments.make[1])))
        return
    if arguments.measure:
        print(*measure(Path(arguments.measure[0]), arguments.measure[1]))
        return
    for name in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            stored, shard = map(int, _run("--make", name, folder).split())
            print(f"{name}: {stored / MIB:.0f} MiB float32 in {NUM_SHARDS} shards, the largest {shard / MIB:.0f} MiB")
            for dtype_name, weights in (("float32", stored), ("bfloat16", stored // 2)):
                seconds, peak = map(float, _run("--measure", folder, dtype_name).split())
                verdict = "under" if peak < weights + shard else "NOT UNDER"
                print(
                    f"  as {dtype_name}: {seconds:.1f} s, peak {peak / MIB:.0f} MiB, "
                    f"{verdict} weights + one shard = {(weights + shard) / MIB:.0f} MiB",
                    flush=True,
                )


def _run(*arguments: str) -> str:
    return subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
