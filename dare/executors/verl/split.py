"""Batches cut into one part per process, and put together again. Plain tensors: neither Ray nor verl is needed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dare.core.types import AuxLoss, Canvas, Samples, Views


@dataclass
class Shard:
    """One process's part of a batch of views, with rows of its own.

    parts  the views of each forward; every process has as many, the last ones may be empty. Where all are, `views`
           holds a stand-in that counts for nothing
    """

    views: Views
    canvas: Canvas
    parts: list[Tensor]


def split_rows(rows: Tensor, num_workers: int) -> list[Tensor]:
    """Contiguous parts whose lengths differ by one at most; views of one sample mostly stay together."""
    return list(rows.tensor_split(num_workers))


def split_groups(num_rows: int, num_workers: int, group_size: int) -> list[range]:
    """Contiguous ranges of whole groups, as even as groups allow."""
    num_groups = num_rows // group_size
    edges = [round(index * num_groups / num_workers) * group_size for index in range(num_workers)] + [num_rows]
    return [range(start, end) for start, end in pairwise(edges)]


def make_shards(
    views: Views, samples: Samples, parts: Sequence[Tensor], forwards: Callable[[Tensor], list[Tensor]]
) -> list[Shard]:
    """The views that `parts` name, each part with the canvas rows that it needs and no others.

    forwards  which of the views of these lengths go into one forward
    """
    length_R = samples.canvas.is_real_BS.sum(-1)[views.sample_R]
    cut = [forwards(length_R[part]) for part in parts]
    num = max(map(len, cut))
    none = torch.zeros(0, dtype=torch.int64)
    return [
        _shard(views, samples.canvas, part, [*own, *[none] * (num - len(own))])
        for part, own in zip(parts, cut, strict=True)
    ]


def _shard(views: Views, canvas: Canvas, part: Tensor, parts: list[Tensor]) -> Shard:
    chosen = views.rows(part if len(part) else torch.tensor([0]))
    sample_N, row_R = torch.unique(chosen.sample_R, return_inverse=True)
    return Shard(replace(chosen, sample_R=row_R), canvas.rows(sample_N), parts)


def auxiliary_of(auxiliary: AuxLoss | None, rows: Tensor) -> tuple[AuxLoss | None, Tensor]:
    """The entries of the views `rows`, numbered as those views are, and which entries of the whole they are."""
    if auxiliary is None:
        return None, torch.zeros(0, dtype=torch.int64)
    is_mine_AN = auxiliary.view_A[:, None] == rows[None]
    entry_N = is_mine_AN.any(-1).nonzero()[:, 0]
    view_N = is_mine_AN[entry_N].int().argmax(-1) if len(entry_N) else entry_N
    position_N = auxiliary.position_A[entry_N]
    mine = replace(auxiliary, view_A=view_N, position_A=position_N, term=_Renumbered(auxiliary.term, entry_N))
    return mine, entry_N


@dataclass
class _Renumbered:
    """The terms `entry_N` of a loss under the numbers 0, 1, ..."""

    term: Any
    entry_N: Tensor

    def __call__(self, logits_CV: Tensor, entry_C: Tensor) -> Tensor:
        value: Tensor = self.term(logits_CV, self.entry_N[entry_C])
        return value
