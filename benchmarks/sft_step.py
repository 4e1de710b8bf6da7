"""One SFT step against a plain implementation of the same loss: time, loss and the memory that the loss takes.

    python benchmarks/sft_step.py                # a minute or two on one core; writes benchmarks/results/sft_step.txt

Plain: all rows padded to the longest, logits of every position, `F.cross_entropy` on them, one backward, AdamW. Ours:
`dare.training.update`, as every recipe runs it. Both have the same weights, masks and optimizer, V = 32768 and d = 512.
Times are CPU seconds of one thread, so that a busy machine does not decide; the best of several alternating runs.
"whole" is ours with the outputs of the last layer computed everywhere instead of at targets only.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dare.algorithms.base import Algorithm
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.core.types import Samples
from dare.data.rows import EncodedRow
from dare.diffusion import blocks
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.families.layers.head import chunk_rows
from dare.families.weights import create_family
from dare.training.live_bytes import LiveBytes
from dare.training.offline import rows_to_samples
from dare.training.update import plan_iterations, update

VOCAB, WIDTH, NUM_ROWS = 32768, 512, 8
MASK_ID, EOS_ID, PAD_ID = VOCAB - 1, VOCAB - 2, VOCAB - 3


def recipe() -> Recipe:
    data = {
        "name": "sft-step",
        "model": {"path": "unused"},
        "algorithm": {"name": "sft", "norm": "token"},
        "task": "chain_sum",
        "train": {"micro_batch_tokens": 512},
    }
    return parse_recipe(data, where="benchmark")


def make_rows(kind: str) -> list[EncodedRow]:
    """Random rows: "equal" of one length, "mixed" with lengths as chat data has them, a long tail."""
    key = Key(3).fold(kind)
    rows = []
    for index in range(NUM_ROWS):
        share = 1.0 if kind == "equal" else ((index + 1) / NUM_ROWS) ** 2
        lengths = [max(8, int(length * share)) for length in (64, 192)]
        uniform = key.uniform(torch.tensor(index), torch.arange(sum(lengths)))
        ids = (uniform * (VOCAB - 8)).long().tolist()
        prompt, completion = ids[: lengths[0]], ids[lengths[0] :]
        rows.append(EncodedRow(f"{kind}/{index}", prompt, completion, [True] * len(completion)))
    return rows


class Ours:
    def __init__(self, family: Family, rows: list[EncodedRow]) -> None:
        self.algorithm: Algorithm[Any] = recipe().algorithm.build()
        self.engine = LocalEngine(recipe(), family, num_updates=100, needs_reference=False)
        self.samples: Samples = rows_to_samples(self.engine, rows, None)
        (self.iteration,) = plan_iterations(self.engine, self.algorithm, self.samples, Key(1), num=1)

    def step(self) -> float:
        return update(self.engine, self.algorithm, self.samples, self.iteration)["loss"]


class Whole(Ours):
    """Ours, with a last layer that computes everything."""

    def step(self) -> float:
        view_hidden = Family.view_hidden

        def every(family: Family, *args: Any, is_read_RS: Tensor | None = None, **options: Any) -> Tensor:
            return view_hidden(family, *args, **options)

        Family.view_hidden = every  # type: ignore[method-assign, assignment]
        try:
            return super().step()
        finally:
            Family.view_hidden = view_hidden  # type: ignore[method-assign]


class Plain:
    """What a first implementation looks like: correct, and wasteful in the usual ways."""

    def __init__(self, family: Family, ours: Ours) -> None:
        self.family = family
        self.views, self.samples = ours.iteration.views, ours.samples
        optimizer = recipe().optimizer
        self.adam = torch.optim.AdamW(
            family.network.parameters(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0.0
        )

    def logits(self) -> Tensor:
        is_real_RS = self.samples.canvas.is_real_BS[self.views.sample_R]
        position_RS = blocks.positions(is_real_RS)
        hidden = self.family.hidden(self.views.noisy_RS, position_RS, blocks.full_mask(is_real_RS))
        return (hidden @ self.family.network.head_weight.T).float()

    def loss(self, logits_RSV: Tensor) -> Tensor:
        views = self.views
        nll_RS = functional.cross_entropy(logits_RSV.transpose(1, 2), views.target_RS, reduction="none")
        weighted_RS = torch.where(views.is_target_RS, nll_RS * views.weight_RS, 0.0)
        return weighted_RS.sum() / self.samples.is_scored_BS.sum()

    def step(self) -> float:
        loss = self.loss(self.logits())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.family.network.parameters(), recipe().optimizer.max_grad_norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return float(loss.detach())


def loss_memory(ours: Ours, plain: Plain) -> tuple[int, int]:
    """Bytes beyond the gradients of hidden states and weights that each loss takes at most, forward and backward."""
    family, views, canvas = (
        ours.engine.family,
        ours.iteration.views,
        ours.samples.canvas.rows(ours.iteration.views.sample_R),
    )
    found = []
    hidden = family.view_hidden(views, canvas).detach().requires_grad_()
    factor_RS = torch.ones(views.noisy_RS.shape)
    num_targets = int(views.is_target_RS.sum())
    gradients = (hidden.numel() + num_targets * WIDTH * 2 + family.network.head_weight.numel()) * 4
    with LiveBytes() as count:
        total, _ = family.target_total(hidden, views, factor_RS)
        total.backward()
    found.append(count.peak - gradients)
    family.network.zero_grad(set_to_none=True)
    hidden.grad = None
    del total
    with LiveBytes() as count:
        loss = plain.loss((hidden @ family.network.head_weight.T).float())
        loss.backward()
    found.append(count.peak - (hidden.numel() + family.network.head_weight.numel()) * 4)
    family.network.zero_grad(set_to_none=True)
    return found[0], found[1]


def best_times(runners: list[Ours | Plain], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(repeats):
        for runner, found in zip(runners, times, strict=True):
            start = time.process_time()
            runner.step()
            found.append(time.process_time() - start)
    return [min(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--kinds", choices=("equal", "mixed"), nargs="+", default=["equal", "mixed"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sft_step.txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chunk_bytes = chunk_rows(VOCAB) * VOCAB * 4
    lines = [
        f"one thread of {platform.processor() or platform.machine()}, torch {torch.__version__}; V {VOCAB}, d {WIDTH}, "
        f"{NUM_ROWS} rows; CPU seconds, best of {options.repeats}; MiB of the loss beyond gradients",
        f"{'layers':>6} {'rows':>6} {'padding':>8} {'plain s':>8} {'whole s':>8} {'ours s':>8} {'ratio':>6} "
        f"{'loss difference':>16} "
        f"{'plain MiB':>10} {'ours MiB':>9} {'chunks':>7}",
    ]
    print("\n".join(lines), flush=True)
    for layers in options.layers:
        for kind in options.kinds:
            family = create_family(
                "llada",
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_layers=layers,
                num_heads=8,
                mlp_size=1536,
                max_length=512,
                mask_id=MASK_ID,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                seed=0,
            )
            ours, whole = (of(copy.deepcopy(family), make_rows(kind)) for of in (Ours, Whole))
            plain = Plain(family, ours)
            used, plain_used = loss_memory(ours, plain)
            difference = max(abs(ours.step() - plain.step()) for _ in range(2))  # also after an update
            seconds, whole_seconds, plain_seconds = best_times([ours, whole, plain], options.repeats)
            padding = 1.0 - float(ours.samples.canvas.is_real_BS.float().mean())
            lines.append(
                f"{layers:>6} {kind:>6} {padding:>8.2f} {plain_seconds:>8.2f} {whole_seconds:>8.2f} {seconds:>8.2f} "
                f"{plain_seconds / seconds:>6.2f} {difference:>16.1e} {plain_used / 2**20:>10.0f} {used / 2**20:>9.1f} "
                f"{used / chunk_bytes:>7.2f}"
            )
            print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
