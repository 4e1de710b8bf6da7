"""How a step reads the network: one class per cache, all with the same answer for an exact one.

    cache    tokens per step and row        exact
    none     the whole canvas               yes
    block    the current block              yes (block-causal attention)
    prefix   current block and all after    no: the text before it is stale within a block (Fast-dLLM)
    dual     the current block              no: the text before and after it is stale within a block (Fast-dLLM)

Rows are given as indices into the batch; a cache holds the same rows in the same order.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dare.diffusion import blocks
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.plan import Plan


class Hidden(NamedTuple):
    """Final hidden states [H, K, D] that score the tokens of each row's current block.

    unconditional_HKD  the same with every given position masked, for classifier-free guidance
    whole_HSD          the same of every position of the canvas, where drafts are recorded under full attention
    """

    plain_HKD: Tensor
    unconditional_HKD: Tensor | None = None
    whole_HSD: Tensor | None = None

    def at(self, place_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both at N positions, [N, D] each."""
        unconditional_HKD = self.unconditional_HKD
        unconditional_ND = None if unconditional_HKD is None else unconditional_HKD[place_N, column_N]
        return self.plain_HKD[place_N, column_N], unconditional_ND


class Forward(Protocol):
    """Reads the current block of each row in the light of what the row holds."""

    has_store_pass: ClassVar[bool]  # a complete block is read once more, clean, before the row moves on
    keeps_rows_until: ClassVar[float]  # finished rows are dropped once the share of unfinished ones is at most this

    def read(self, row_H: Tensor) -> Hidden: ...

    def keep(self, index_H: Tensor) -> None:
        """Forget all rows but these (indices into the rows of the last call)."""
        ...


def make_forward(family: Family, batch: Batch, plan: Plan, row_H: Tensor, *, has_drafts: bool = False) -> Forward:
    """The forward for the plan's cache, ready for the rows `row_H`."""
    if plan.cache == "none":
        return Uncached(family, batch, is_guided=plan.decode.cfg_scale > 0.0, has_drafts=has_drafts)
    if plan.cache == "block":
        return BlockCached(family, batch, row_H)
    return RefreshedCache(family, batch, row_H, is_dual=plan.cache == "dual")


class Uncached:
    """The whole canvas at every step."""

    has_store_pass: ClassVar[bool] = False
    keeps_rows_until: ClassVar[float] = 1.0

    def __init__(self, family: Family, batch: Batch, *, is_guided: bool, has_drafts: bool = False) -> None:
        self.family, self.batch, self.is_guided = family, batch, is_guided
        self.is_whole = has_drafts and not batch.canvas.is_blockwise

    def read(self, row_H: Tensor) -> Hidden:
        canvas = self.batch.canvas.rows(row_H)
        if canvas.is_blockwise:
            visible: Tensor | None = blocks.block_causal_mask(canvas.block_BS, canvas.is_real_BS)
        else:
            visible = blocks.full_mask(canvas.is_real_BS)
        hidden_HSD = self.family.hidden(canvas.input_BS, _columns(canvas.input_BS), visible)
        window_HK = self.batch.window(row_H)
        plain_HKD = self._scoring(hidden_HSD, window_HK)
        whole_HSD = self._scoring(hidden_HSD, _columns(canvas.input_BS)) if self.is_whole else None
        if not self.is_guided:
            return Hidden(plain_HKD, whole_HSD=whole_HSD)
        is_given_HS = canvas.is_real_BS & ~canvas.is_completion_BS
        masked_HS = canvas.input_BS.masked_fill(is_given_HS, self.batch.mask_id)
        unconditional_HSD = self.family.hidden(masked_HS, _columns(masked_HS), visible)
        return Hidden(plain_HKD, self._scoring(unconditional_HSD, window_HK), whole_HSD)

    def keep(self, index_H: Tensor) -> None:
        pass

    def _scoring(self, hidden_HSD: Tensor, position_HK: Tensor) -> Tensor:
        """The states that score the tokens at `position_HK`."""
        if self.family.spec.is_shifted:
            position_HK = (position_HK - 1).clamp(min=0)
        return _take(hidden_HSD, position_HK)


class BlockCached:
    """Exact for block-causal attention: keys and values of complete blocks never change.

    Whole blocks of the prompt are stored in one forward. After that every forward runs each row's current block: a
    masked one is denoised, and a complete one is thereby stored clean, over what its noisy versions left there.
    """

    has_store_pass: ClassVar[bool] = True
    keeps_rows_until: ClassVar[float] = 0.75  # dropping rows copies the cache

    def __init__(self, family: Family, batch: Batch, row_H: Tensor) -> None:
        self.family, self.batch = family, batch
        self.cache = family.cache(len(row_H), batch.canvas.length)
        num_stored = int(batch.start_B[row_H].max())
        if num_stored:
            canvas = batch.canvas.rows(row_H)
            ids_HT, block_HS = canvas.input_BS[:, :num_stored], canvas.block_BS
            # Rows with a shorter prompt also write what lies beyond it; it is overwritten before anything reads it.
            visible = (block_HS[:, None, :] <= block_HS[:, :num_stored, None])[:, None]
            family.hidden(ids_HT, _columns(ids_HT), visible, self.cache)

    def read(self, row_H: Tensor) -> Hidden:
        window_HK = self.batch.window(row_H)
        slot_S = torch.arange(self.cache.length, device=row_H.device)
        visible = (slot_S <= window_HK[:, -1:])[:, None, None, :]
        ids_HK = self.batch.canvas.input_BS[row_H[:, None], window_HK]
        return Hidden(self.family.hidden(ids_HK, window_HK, visible, self.cache))

    def keep(self, index_H: Tensor) -> None:
        self.cache = self.cache.rows(index_H)


class RefreshedCache:
    """Fast-dLLM (Wu et al. 2025): approximate for full attention.

    The first step of a block runs the whole canvas and stores it. Later steps of the block run only its own
    positions (dual) or those and all after them (prefix) against what is stored. With a shift, nothing then scores the
    block's first position, which the first step has committed (see `Plan.has_first_step`).
    """

    has_store_pass: ClassVar[bool] = False
    keeps_rows_until: ClassVar[float] = 0.75

    def __init__(self, family: Family, batch: Batch, row_H: Tensor, *, is_dual: bool) -> None:
        self.family, self.batch, self.is_dual = family, batch, is_dual
        self.cache = family.cache(len(row_H), batch.canvas.length)

    def read(self, row_H: Tensor) -> Hidden:
        is_first_H = self.batch.block_step_B[row_H] == 0
        indices, parts = [], []
        for is_refresh, is_member_H in ((True, is_first_H), (False, ~is_first_H)):
            index_I = is_member_H.nonzero()[:, 0]
            if len(index_I):
                indices.append(index_I)
                parts.append(self._read_part(row_H[index_I], index_I, is_refresh))
        return Hidden(torch.cat(parts)[torch.cat(indices).argsort()])

    def keep(self, index_H: Tensor) -> None:
        self.cache = self.cache.rows(index_H)

    def _read_part(self, row_I: Tensor, index_I: Tensor, is_refresh: bool) -> Tensor:
        """Rows in the same phase; `index_I` are their places in the cache."""
        window_IK = self.batch.window(row_I)
        position_IT = self._positions(row_I, window_IK, is_refresh)
        ids_IT = self.batch.canvas.input_BS[row_I[:, None], position_IT]
        visible = blocks.full_mask(self.batch.canvas.is_real_BS[row_I])
        is_whole = len(index_I) == len(self.cache.keys[0])
        cache = self.cache if is_whole else self.cache.rows(index_I)
        hidden_ITD = self.family.hidden(ids_IT, position_IT, visible, cache)
        if not is_whole:
            for stored, new in zip(self.cache.keys + self.cache.values, cache.keys + cache.values, strict=True):
                stored[index_I] = new
        index_IK = window_IK - position_IT[:, :1]
        return _take(hidden_ITD, (index_IK - 1).clamp(min=0) if self.family.spec.is_shifted else index_IK)

    def _positions(self, row_I: Tensor, window_IK: Tensor, is_refresh: bool) -> Tensor:
        width = self.batch.canvas.length
        if is_refresh:
            return torch.arange(width, device=row_I.device).expand(len(row_I), width)
        if self.is_dual:
            return window_IK
        start_I = window_IK[:, 0]
        offset_T = torch.arange(int((self.batch.end_B[row_I] - start_I).max()), device=row_I.device)
        # Rows with less to come run padding instead, which nothing real attends to.
        return (start_I[:, None] + offset_T).clamp(max=width - 1)


def _columns(ids_HT: Tensor) -> Tensor:
    """Rows are left-aligned, so columns are positions."""
    return torch.arange(ids_HT.shape[1], device=ids_HT.device).expand_as(ids_HT)


def _take(hidden_HTD: Tensor, index_HK: Tensor) -> Tensor:
    return hidden_HTD.gather(1, index_HK[..., None].expand(-1, -1, hidden_HTD.shape[-1]))
