"""How a step reads the network: one class per cache, all with the same answer for an exact one.

    cache    tokens per step and row        exact
    none     the whole canvas               yes
    block    the current block              yes (block-causal attention)
    prefix   current block and all after    no: the text before it is stale within a block (Fast-dLLM)
    dual     the current block              no: the text before and after it is stale within a block (Fast-dLLM)

Rows come and go at any step. Each has a seat, which is its row of the cache; what rows of one prompt have in common
is computed once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dare.diffusion import blocks
from dare.families.base import Family
from dare.families.layers.attention import Cache, CacheRows, Read, Visible
from dare.rollout.batch import Batch
from dare.rollout.live import Live
from dare.rollout.meter import Meter
from dare.rollout.plan import Plan
from dare.rollout.seats import Change


class Hidden(NamedTuple):
    """Final hidden states [N, D] that score the tokens of N positions in the current blocks.

    unconditional_ND  the same with every given position masked, for classifier-free guidance
    whole_HSD         the same of every position of the canvas, where drafts are recorded under full attention
    """

    plain_ND: Tensor
    unconditional_ND: Tensor | None = None
    whole_HSD: Tensor | None = None


class Forward(Protocol):
    """Reads the current block of each seated row in the light of what the row holds."""

    def seat(self, change: Change) -> None:
        """Rows have moved to other seats, and new ones sat down."""
        ...

    def read(self, place_N: Tensor, column_N: Tensor) -> Hidden:
        """The states that score the columns `column_N` of the current blocks of the seats `place_N`, row-major."""
        ...


class Machine(NamedTuple):
    """What every forward works with."""

    family: Family
    batch: Batch
    live: Live
    meter: Meter

    def run(self, ids_BT: Tensor, position_BT: Tensor, visible: Visible, cache: Cache | None, read: Read) -> Tensor:
        """[N, D]: `Family.hidden_at`, metered."""
        meter, (num_rows, length) = self.meter, ids_BT.shape
        width = cache.width if isinstance(cache, CacheRows) and not cache.is_fresh else length
        num_queries = length if read.column_RQ is None else read.column_RQ.shape[1]
        meter.num_forwards += 1
        meter.num_tokens += num_rows * length
        meter.num_read += len(read.place_N)
        meter.num_pairs += num_rows * length * width
        meter.num_read_pairs += read.num_rows * num_queries * width
        meter.switch("backbone")
        hidden_ND = self.family.hidden_at(ids_BT, position_BT, visible, cache, read)
        meter.switch("bookkeeping")
        return hidden_ND

    def canvas_columns(self, row_U: Tensor) -> Tensor:
        """int64 [U, W]: every column that a seated row has; rows are left-aligned, so these are positions."""
        return torch.arange(self.live.width, device=row_U.device).expand(len(row_U), -1)

    def real(self, row_U: Tensor) -> Visible:
        """Which columns of the rows are not padding; None where all are real."""
        if not self.live.has_padding(self.live.rows):
            return None
        return self.batch.canvas.is_real_BS[row_U, : self.live.width][:, None, None, :]

    def scoring(self, position_UQ: Tensor) -> Tensor:
        """Where the states that score the tokens at these positions are."""
        return (position_UQ - 1).clamp(min=0) if self.family.spec.is_shifted else position_UQ


def make_forward(
    family: Family, batch: Batch, plan: Plan, live: Live, meter: Meter, *, has_drafts: bool = False
) -> Forward:
    """The forward for the plan's cache."""
    machine = Machine(family, batch, live, meter)
    if plan.cache == "none":
        return Uncached(machine, is_guided=plan.decode.cfg_scale > 0.0, has_drafts=has_drafts)
    if plan.cache == "block":
        return BlockCached(machine, is_merged=plan.is_merged)
    return RefreshedCache(machine, is_dual=plan.cache == "dual")


class Uncached:
    """The whole canvas at every step; the first one of equal canvases once."""

    def __init__(self, machine: Machine, *, is_guided: bool, has_drafts: bool = False) -> None:
        self.machine, self.is_guided = machine, is_guided
        self.is_whole = has_drafts and not machine.batch.canvas.is_blockwise
        self._fresh: list[int] = []  # seats whose rows have not been read yet
        self._first: dict[int, Tensor] = {}  # [P, Q, D] of the first step, by twin, while rows of it are waiting

    def seat(self, change: Change) -> None:
        self._fresh = change.admitted

    def read(self, place_N: Tensor, column_N: Tensor) -> Hidden:
        batch, live, machine = self.machine.batch, self.machine.live, self.machine
        window_HK = batch.window(live.row_H)
        position_HQ = machine.canvas_columns(live.row_H) if self.is_whole else window_HK
        column_N = window_HK[place_N, column_N] if self.is_whole else column_N
        if not self._fresh and not self.is_whole:
            flat_N = place_N * position_HQ.shape[1] + column_N
            return Hidden(*self._run(live.row_H, position_HQ, flat_N))
        hidden_PHQD = self._rectangle(live.row_H, position_HQ)
        plain_ND, *unconditional = hidden_PHQD[:, place_N, column_N]
        whole_HSD = hidden_PHQD[0] if self.is_whole else None
        return Hidden(plain_ND, unconditional[0] if unconditional else None, whole_HSD)

    def _rectangle(self, row_H: Tensor, position_HQ: Tensor) -> Tensor:
        """[P, H, Q, D]: the states at all of these positions, equal first canvases run once."""
        live = self.machine.live
        twin_of = {seat: live.twins[live.rows[seat]] for seat in self._fresh}
        leaders = {twin: seat for seat, twin in twin_of.items() if twin not in self._first}
        run = [seat for seat in range(len(live.rows)) if seat not in twin_of or leaders.get(twin_of[seat]) == seat]
        index_U = torch.tensor(run, dtype=torch.int64, device=row_H.device)
        num_columns = position_HQ.shape[1]
        flat_N = torch.arange(len(run) * num_columns, device=row_H.device)
        parts = self._run(row_H[index_U], position_HQ[index_U], flat_N) if run else []
        hidden_PUQD = [part.view(len(run), num_columns, -1) for part in parts]
        place = {seat: index for index, seat in enumerate(run)}
        self._first |= {
            twin: torch.stack([part[place[seat]] for part in hidden_PUQD]) for twin, seat in leaders.items()
        }
        shared = [seat for seat in self._fresh if seat not in place]
        known = torch.stack([self._first[twin_of[seat]] for seat in shared], dim=1) if shared else None
        # Whole canvases are not kept: those of later steps may be wider.
        is_kept = {twin: not self.is_whole and live.num_waiting(twin) > 0 for twin in self._first}
        self._first = {twin: first for twin, first in self._first.items() if is_kept[twin]}
        self._fresh = []
        every = [torch.stack(hidden_PUQD)] if run else []
        every += [] if known is None else [known]
        order = torch.tensor([*run, *shared], device=row_H.device).argsort()
        return torch.cat(every, dim=1)[:, order]

    def _run(self, row_U: Tensor, position_UQ: Tensor, flat_N: Tensor) -> list[Tensor]:
        """[N, D] each: the states at `flat_N` of [U, Q]; with guidance also those without a prompt."""
        machine, canvas = self.machine, self.machine.batch.canvas
        width = machine.live.width
        ids_UW, is_real_UW = canvas.input_BS[row_U, :width], canvas.is_real_BS[row_U, :width]
        if canvas.is_blockwise:
            visible: Visible = blocks.block_causal_mask(canvas.block_BS[row_U, :width], is_real_UW)
        else:
            visible = machine.real(row_U)
        read = Read(len(row_U), machine.scoring(position_UQ), flat_N)
        inputs = [ids_UW]
        if self.is_guided:
            is_given_UW = is_real_UW & ~canvas.is_completion_BS[row_U, :width]
            inputs.append(ids_UW.masked_fill(is_given_UW, machine.batch.mask_id))
        return [machine.run(ids, machine.canvas_columns(row_U), visible, None, read) for ids in inputs]


class BlockCached:
    """Exact for block-causal attention: keys and values of complete blocks never change.

    Whole blocks of a prompt are stored when its first row sits down, and copied for the others. After that every
    forward runs each row's current block. A block that was completed is stored clean, over what its noisy versions
    left there, by the forward that takes the first step of the next one: as further rows of the same call, which cost
    the tokens that a forward of their own would (`is_merged=False`), but no launch and no pass over the weights.
    """

    def __init__(self, machine: Machine, *, is_merged: bool) -> None:
        self.machine, self.is_merged = machine, is_merged
        self.cache = machine.family.cache(machine.live.capacity, machine.batch.canvas.length)
        self._held: list[int | None] = [
            None
        ] * machine.live.capacity  # by seat, the twin whose first blocks are stored there

    def seat(self, change: Change) -> None:
        if change.moved:
            target_N, source_N = torch.tensor(change.moved, device=self.machine.live.row_H.device).unbind(-1)
            self.cache.copy_rows(target_N, source_N, self.machine.live.width)
            for target, source in change.moved:
                self._held[target] = self._held[source]
        if change.admitted:
            self._fill(change.admitted)

    def read(self, place_N: Tensor, column_N: Tensor) -> Hidden:
        batch, row_H = self.machine.batch, self.machine.live.row_H
        seat_H = torch.arange(len(row_H), device=row_H.device)
        window_HK = batch.window(row_H)
        read = Read(len(row_H), None, place_N * batch.block_length + column_N)
        stale_M = batch.is_stale_B[row_H].nonzero()[:, 0]
        batch.is_stale_B[row_H] = False
        before_MK = window_HK[stale_M] - batch.block_length
        if self.is_merged or not len(stale_M):
            seat_C, window_CK = torch.cat([seat_H, stale_M]), torch.cat([window_HK, before_MK])
            return Hidden(self._run(seat_C, window_CK, len(row_H), read))
        nothing = Read(0, None, stale_M[:0])
        self._run(stale_M, before_MK, 0, nothing)
        return Hidden(self._run(seat_H, window_HK, len(row_H), read))

    def _run(self, seat_C: Tensor, window_CK: Tensor, num_first: int, read: Read) -> Tensor:
        """[N, D]: one call on blocks of these seats."""
        machine, batch = self.machine, self.machine.batch
        width = int(window_CK.max()) + 1
        visible = (torch.arange(width, device=seat_C.device) <= window_CK[:, -1:])[:, None, None, :]
        ids_CK = batch.canvas.input_BS[machine.live.row_H[seat_C, None], window_CK]
        cache = CacheRows(self.cache, seat_C, num_first, width)
        return machine.run(ids_CK, window_CK, visible, cache, read)

    def _fill(self, admitted: list[int]) -> None:
        """Store the blocks before each new row's first one: copied from a seat that holds them, or computed once."""
        live = self.machine.live
        twin_of = {seat: live.twins[live.rows[seat]] for seat in admitted if live.first[live.rows[seat]]}
        holders = {twin: seat for seat, twin in enumerate(self._held) if twin is not None}
        self._copy({seat: holders[twin] for seat, twin in twin_of.items() if twin in holders})
        leaders = {twin: seat for seat, twin in reversed(twin_of.items()) if twin not in holders}
        if leaders:
            self._prefill(list(leaders.values()))
        self._copy({seat: leaders[twin] for seat, twin in twin_of.items() if twin in leaders})
        for seat in admitted:
            self._held[seat] = twin_of.get(seat)

    def _copy(self, source_of: dict[int, int]) -> None:
        live, pairs = self.machine.live, [pair for pair in source_of.items() if pair[0] != pair[1]]
        if pairs:
            length = max(live.first[live.rows[seat]] for seat, _ in pairs)
            target_N, source_N = torch.tensor(pairs, device=live.row_H.device).unbind(-1)
            self.cache.copy_rows(target_N, source_N, length)

    def _prefill(self, seats: list[int]) -> None:
        """Rows with less before their first block also write what lies in it; it is overwritten before it is read."""
        machine, canvas, live = self.machine, self.machine.batch.canvas, self.machine.live
        length = max(live.first[live.rows[seat]] for seat in seats)
        seat_U = torch.tensor(seats, device=live.row_H.device)
        row_U = live.row_H[seat_U]
        block_UT = canvas.block_BS[row_U, :length]
        visible = (block_UT[:, None, :] <= block_UT[:, :, None])[:, None]
        position_UT = torch.arange(length, device=row_U.device).expand_as(block_UT)
        cache = CacheRows(self.cache, seat_U, 0, length, is_fresh=True)
        machine.run(canvas.input_BS[row_U, :length], position_UT, visible, cache, Read(0, None, seat_U[:0]))


class RefreshedCache:
    """Fast-dLLM (Wu et al. 2025): approximate for full attention.

    The first step of a block runs the whole canvas and stores it. Later steps of the block run only its own
    positions (dual) or those and all after them (prefix) against what is stored. With a shift, nothing then scores the
    block's first position, which the first step has committed (see `Plan.has_first_step`).
    """

    def __init__(self, machine: Machine, *, is_dual: bool) -> None:
        self.machine, self.is_dual = machine, is_dual
        self.cache = machine.family.cache(machine.live.capacity, machine.batch.canvas.length)
        self._leader: dict[int, int] = {}  # new seats, and the one whose first refresh serves them too

    def seat(self, change: Change) -> None:
        live = self.machine.live
        if change.moved:
            target_N, source_N = torch.tensor(change.moved, device=live.row_H.device).unbind(-1)
            self.cache.copy_rows(target_N, source_N, live.width)
        first: dict[int, int] = {}
        self._leader = {seat: first.setdefault(live.twins[live.rows[seat]], seat) for seat in change.admitted}

    def read(self, place_N: Tensor, column_N: Tensor) -> Hidden:
        live, batch = self.machine.live, self.machine.batch
        is_first_H = batch.block_step_B[live.row_H] == 0
        hidden_ND = torch.empty(
            len(place_N),
            self.machine.family.network.head_weight.shape[1],
            dtype=self.machine.family.dtype,
            device=place_N.device,
        )
        for run, is_member_H in ((self._refresh, is_first_H), (self._read_on, ~is_first_H)):
            index_I, part_N = is_member_H.nonzero()[:, 0], is_member_H[place_N].nonzero()[:, 0]
            if len(index_I):
                hidden_ND[part_N] = run(index_I, place_N[part_N], column_N[part_N])
        return Hidden(hidden_ND)

    def _refresh(self, index_I: Tensor, place_N: Tensor, column_N: Tensor) -> Tensor:
        """[N, D], with the canvases of the seats `index_I` stored anew; equal new ones are run once."""
        live, batch, machine = self.machine.live, self.machine.batch, self.machine
        followers = [(seat, leader) for seat, leader in self._leader.items() if seat != leader]
        self._leader = {}
        leader_H = torch.arange(len(live.rows), device=index_I.device)
        if followers:
            seat_F, leader_F = torch.tensor(followers, device=index_I.device).unbind(-1)
            leader_H[seat_F] = leader_F
            index_I = index_I[leader_H[index_I] == index_I]
        row_I = live.row_H[index_I]
        num_columns = batch.block_length
        position_IT = machine.canvas_columns(row_I)
        everything = torch.arange(len(row_I) * num_columns, device=row_I.device)
        read = Read(len(row_I), machine.scoring(batch.window(row_I)), everything)
        cache = CacheRows(self.cache, index_I, 0, live.width, is_fresh=True)
        ids_IT = batch.canvas.input_BS[row_I, : live.width]
        hidden_ND = machine.run(ids_IT, position_IT, machine.real(row_I), cache, read)
        if followers:
            self.cache.copy_rows(seat_F, leader_F, live.width)
        place_H = torch.zeros_like(leader_H).index_put((index_I,), torch.arange(len(index_I), device=row_I.device))
        return hidden_ND[place_H[leader_H[place_N]] * num_columns + column_N]

    def _read_on(self, index_I: Tensor, place_N: Tensor, column_N: Tensor) -> Tensor:
        """[N, D]: the states of rows whose canvas has been stored; their new tokens are stored too."""
        live, batch, machine = self.machine.live, self.machine.batch, self.machine
        row_I = live.row_H[index_I]
        window_IK = batch.window(row_I)
        position_IT = window_IK if self.is_dual else self._from(row_I, window_IK[:, 0])
        column_IK = machine.scoring(window_IK - window_IK[:, :1])
        place_H = torch.zeros_like(live.row_H).index_put((index_I,), torch.arange(len(index_I), device=row_I.device))
        read = Read(len(row_I), column_IK, place_H[place_N] * batch.block_length + column_N)
        num_first = len(index_I) if len(index_I) == len(live.rows) else 0
        cache = CacheRows(self.cache, index_I, num_first, live.width)
        ids_IT = batch.canvas.input_BS[row_I[:, None], position_IT]
        visible = machine.real(row_I)
        return machine.run(ids_IT, position_IT, visible, cache, read)

    def _from(self, row_I: Tensor, start_I: Tensor) -> Tensor:
        """int64 [I, T]: the positions from `start_I` on."""
        offset_T = torch.arange(int((self.machine.batch.end_B[row_I] - start_I).max()), device=row_I.device)
        # Rows with less to come run their last column again, which changes nothing.
        return (start_I[:, None] + offset_T).clamp(max=self.machine.live.width - 1)
