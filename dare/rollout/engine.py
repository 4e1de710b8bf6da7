"""The denoising loop: prompts in, traces out.

            +--------------- until every row is done ----------------+
            v                                                        |
    read the current block of every row -> candidates at its masks   |
         -> the unmask policy commits some; committed tokens may be  |
            edited -> rows whose block is complete (and at rest)     |
            store it (block cache) and move on, or leave ------------+

Rows never wait for one another: each has its own block, step and random numbers, keyed by (sample id, position, step).
A completion is therefore the same in any batch, order or company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.diffusion import unmask
from dare.diffusion.trace import is_eos
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.candidates import propose
from dare.rollout.drafts import DraftLog, check_drafts
from dare.rollout.forward import Hidden, make_forward
from dare.rollout.plan import Plan, check_prompts, make_plan
from dare.rollout.predictions import PredictionLog
from dare.rollout.record import begin_batch, empty_trace, finished, record_batch


@dataclass(frozen=True)
class StepEvent:
    """One denoising step of N rows, just after it; tensors on the CPU.

    rows             indices into the prompts of the call
    step_N           int64 each row's own 0-based step
    ids_NS           int64 the canvas; positions not yet sampled hold the mask id
    is_committed_NS  bool  what this step committed or replaced
    logp_NS          float32 log-prob at commit of everything committed so far, nats; 0 elsewhere
    """

    rows: list[int]
    step_N: Tensor
    ids_NS: Tensor
    is_committed_NS: Tensor
    logp_NS: Tensor


def denoise(
    family: Family,
    prompts: list[list[int]],
    decode: Decode,
    key: Key,
    sample_ids: list[int],
    *,
    weights_version: int = 0,
    has_drafts: bool = False,
    num_alternatives: int = 0,
    on_step: Callable[[StepEvent], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TraceBatch:
    """One completion per prompt, in order, on the CPU.

    sample_ids   with `key`, name the random numbers of each row: equal ids and prompts give equal completions
    has_drafts   record every step's full prediction in `drafts`
    num_alternatives  record what every step thought of its open positions in `predictions`, with as many tokens for
                 each; 0 = do not
    on_step      called after every denoising step
    on_progress  called with (positions settled, all completion positions) after every denoising step

    Nothing here depends on how rows are batched; `decode.batch_size` bounds memory. Raises DareError for options that
    do not fit the family and for a prompt that does not fit the model, NonFiniteError if the network's output is not
    finite.
    """
    if len(prompts) != len(sample_ids):
        raise ValueError(f"{len(prompts)} prompts, but {len(sample_ids)} sample ids")
    if not prompts:
        raise DareError("there is no prompt to complete", got="an empty list")
    plan = make_plan(family, decode)
    check_prompts(family, prompts)
    log = DraftLog() if has_drafts else None
    predictions = PredictionLog(num_alternatives) if num_alternatives else None
    if has_drafts:
        check_drafts(plan)
    canvas = family.empty_canvas(prompts, decode.gen_length, plan.block_length)
    trace = empty_trace(family, plan, canvas, sample_ids, weights_version)
    order_B = torch.tensor(sorted(range(len(prompts)), key=lambda row: len(prompts[row])))
    num_total = int(canvas.is_completion_BS.sum())
    num_later = num_total  # in batches that have not begun
    with torch.no_grad():
        for index_B in torch.split(order_B, decode.batch_size):
            batch = begin_batch(family, plan, trace, index_B)
            num_later -= batch.num_waiting()
            for listener in (log, predictions):
                if listener is not None:
                    listener.index_B = index_B
            for row_N, is_committed_NK in Run(family, plan, key, batch, log, predictions).steps():
                if on_step is not None:
                    on_step(_event(batch, index_B, row_N, is_committed_NK, canvas.length))
                if on_progress is not None:
                    on_progress(num_total - num_later - batch.num_waiting(), num_total)
            record_batch(batch, trace, index_B, family.spec.pad_id)
    done = finished(trace)
    return replace(
        done,
        drafts=None if log is None else log.drafts(done.canvas.length),
        predictions=None if predictions is None else predictions.predictions(),
    )


@dataclass(frozen=True)
class Run:
    """One batch on its way through the loop; the logs, if there are any, hear of every prediction."""

    family: Family
    plan: Plan
    key: Key
    batch: Batch
    log: DraftLog | None = None
    predictions: PredictionLog | None = None

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Denoise every row to its end, or to where it pauses.

        After each step: the N rows that took part and what they wrote, bool [N, K].
        """
        batch = self.batch
        row_H = torch.arange(batch.canvas.batch_size, device=batch.start_B.device)
        row_H = row_H[batch.is_active(row_H)]
        if not len(row_H):
            return
        forward = make_forward(self.family, batch, self.plan, row_H, has_drafts=self.log is not None)
        while len(row_H):
            is_active_H = batch.is_active(row_H)
            is_masked_HK = batch.masked(row_H) & is_active_H[:, None]
            has_mask_H = is_masked_HK.any(-1)
            is_denoising_H = has_mask_H | (is_active_H & self._may_edit(row_H))
            has_step = bool(is_denoising_H.any())  # else all rows only store their blocks
            hidden = forward.read(row_H)
            is_written_HK = self._write(row_H, is_masked_HK, is_denoising_H, hidden) if has_step else is_masked_HK
            batch.count_step(row_H, is_denoising_H, has_mask_H)
            is_settled_H = ~has_mask_H & ~is_written_HK.any(-1)
            is_complete_H = is_active_H & ~batch.masked(row_H).any(-1) & (is_settled_H | ~self._may_edit(row_H))
            batch.is_done_B[row_H] |= is_complete_H & self._is_terminal(row_H)
            if self.plan.has_stop_inside:
                batch.is_done_B[row_H] |= self._has_ended(row_H, is_written_HK)
            if has_step:
                yield row_H[is_denoising_H], is_written_HK[is_denoising_H]
            # With a store pass, a block is stored by the first forward that finds it complete and leaves it so.
            is_leaving_H = is_active_H & (is_settled_H if forward.has_store_pass else is_complete_H)
            batch.advance(row_H[is_leaving_H & ~batch.is_done_B[row_H]])
            is_live_H = batch.is_active(row_H)
            if int(is_live_H.sum()) <= forward.keeps_rows_until * len(row_H):
                forward.keep(is_live_H.nonzero()[:, 0])
                row_H = row_H[is_live_H]

    def _may_edit(self, row_H: Tensor) -> Tensor:
        """bool [H]: whether another step may go over the row's block if that is complete."""
        batch = self.batch
        return ~batch.is_done_B[row_H] & (batch.post_step_B[row_H] < self.plan.max_post_steps)

    def _write(self, row_H: Tensor, is_masked_HK: Tensor, is_denoising_H: Tensor, hidden: Hidden) -> Tensor:
        """bool [H, K]: the positions that this step commits or edits; the batch holds their new tokens afterwards."""
        batch, decode = self.batch, self.plan.decode
        is_open_HK = is_masked_HK
        if decode.edit_threshold is not None:
            is_completion_HK = batch.canvas.is_completion_BS[row_H[:, None], batch.window(row_H)]
            is_open_HK = is_masked_HK | (is_completion_HK & is_denoising_H[:, None])
        place_N, column_N = is_open_HK.nonzero(as_tuple=True)
        row_N = row_H[place_N]
        position_N = batch.start_B[row_N] + column_N
        counters = (batch.sample_id_B[row_N], position_N, batch.step_B[row_N])
        uniform_N = self.key.fold("token").uniform(*counters)
        num_alternatives = self.predictions.num_alternatives if self.predictions is not None else 0
        found = propose(self.family, self.plan, *hidden.at(place_N, column_N), uniform_N, num_alternatives)
        if self.log is not None:
            self.log.add(self.family, batch, self.plan, self.key, row_H, is_masked_HK, hidden, found)
        score_N = found.score_N
        if unmask.find_policy(decode.unmask).score == "uniform":
            score_N = self.key.fold("unmask").uniform(*counters)
        if decode.unmask_temperature:
            score_N = unmask.drawn_order(score_N, decode.unmask_temperature, self.key.fold("unmask").uniform(*counters))
        score_HK = torch.zeros(is_masked_HK.shape, dtype=score_N.dtype, device=score_N.device)
        score_HK[place_N, column_N] = score_N
        held_N = batch.canvas.input_BS[row_N, position_N]
        is_written_HK = self._choose(row_H, score_HK, is_masked_HK, is_denoising_H)
        if decode.edit_threshold is not None:
            is_new_N = held_N != found.token_N
            is_edited_N = ~is_masked_HK[place_N, column_N] & is_new_N & (found.confidence_N > decode.edit_threshold)
            batch.log_edits(row_N[is_edited_N], position_N[is_edited_N])
            is_written_HK[place_N, column_N] |= is_edited_N
        chosen_N = is_written_HK[place_N, column_N]
        if self.predictions is not None:
            self.predictions.add_open(batch, row_N, position_N, held_N, found, score_N, chosen_N)
        batch.commit(row_N[chosen_N], position_N[chosen_N], found.token_N[chosen_N], found.logp_N[chosen_N])
        return is_written_HK

    def _choose(self, row_H: Tensor, score_HK: Tensor, is_masked_HK: Tensor, is_denoising_H: Tensor) -> Tensor:
        """bool [H, K]: the masked positions to commit; where tokens may be masked again, that has happened."""
        plan, decode, step_H = self.plan, self.plan.decode, self.batch.block_step_B[row_H]
        if decode.remask != "none":
            return self._keep_best(row_H, score_HK, is_masked_HK, is_denoising_H)
        num_masked_H, num_left_H = self.batch.num_masked_B[row_H], is_masked_HK.sum(-1)
        due = unmask.due(decode.schedule, num_masked_H, num_left_H, plan.num_steps, step_H, decode.t_min)
        if self.predictions is not None:
            quota_H = due.quota_B if unmask.has_quota(decode.unmask) else None
            self.predictions.add_steps(self.batch, row_H, quota_H, is_denoising_H)
        is_committed_HK = unmask.commits(decode.unmask, score_HK, is_masked_HK, due.quota_B, decode, due.share_B)
        if plan.has_first_step:
            is_first_HK = torch.zeros_like(is_masked_HK)
            is_first_HK[:, 0] = is_masked_HK[:, 0]
            is_committed_HK = torch.where((step_H == 0)[:, None], is_first_HK, is_committed_HK)
        return is_committed_HK

    def _keep_best(self, row_H: Tensor, score_HK: Tensor, is_masked_HK: Tensor, is_denoising_H: Tensor) -> Tensor:
        """bool [H, K]: the masked positions to commit under remasking; the held tokens that lose are masked again."""
        batch = self.batch
        window_HK = batch.window(row_H)
        place_HK = row_H[:, None].expand_as(window_HK)
        is_held_HK = (batch.step_map_BS[place_HK, window_HK] >= 0) & is_masked_HK.any(-1, keepdim=True)
        score_HK = torch.where(is_masked_HK, score_HK, batch.score_BS[place_HK, window_HK].to(score_HK.dtype))
        num_kept_H = unmask.cumulative_quota(batch.num_masked_B[row_H], self.plan.num_steps, batch.block_step_B[row_H])
        is_committed_HK, is_again_HK = unmask.running_confidence(score_HK, is_masked_HK, is_held_HK, num_kept_H)
        if self.predictions is not None:
            self.predictions.add_steps(batch, row_H, num_kept_H, is_denoising_H)
            self.predictions.add_remasked(batch, place_HK[is_again_HK], window_HK[is_again_HK])
        batch.score_BS[place_HK[is_committed_HK], window_HK[is_committed_HK]] = score_HK[is_committed_HK].float()
        batch.mask_again(place_HK[is_again_HK], window_HK[is_again_HK])
        return is_committed_HK

    def _is_terminal(self, row_H: Tensor) -> Tensor:
        """bool [H]: whether the row ends with its current block, once that is complete."""
        batch = self.batch
        is_last_H = batch.start_B[row_H] + batch.block_length >= batch.end_B[row_H]
        if not self.plan.has_eos_stop:
            return is_last_H
        place_HK = (row_H[:, None], batch.window(row_H))
        is_eos_HK = is_eos(batch.canvas.input_BS[place_HK], self.family.spec.eos_ids)
        return is_last_H | (is_eos_HK & batch.canvas.is_completion_BS[place_HK]).any(-1)

    def _has_ended(self, row_H: Tensor, is_written_HK: Tensor) -> Tensor:
        """bool [H]: whether an EOS was just written and nothing is masked before the first EOS of the block."""
        batch = self.batch
        place_HK = (row_H[:, None], batch.window(row_H))
        ids_HK, is_completion_HK = batch.canvas.input_BS[place_HK], batch.canvas.is_completion_BS[place_HK]
        is_eos_HK = is_eos(ids_HK, self.family.spec.eos_ids) & is_completion_HK
        is_before_HK = is_eos_HK.long().cumsum(-1) == 0
        is_open_H = ((ids_HK == batch.mask_id) & is_before_HK).any(-1)
        return (is_eos_HK & is_written_HK).any(-1) & ~is_open_H


def _event(batch: Batch, index_B: Tensor, row_N: Tensor, is_committed_NK: Tensor, width: int) -> StepEvent:
    """What `row_N` just committed; canvases as wide as those of the whole call, padded with zeros."""
    committed_NS = torch.zeros_like(batch.step_map_BS[row_N], dtype=torch.bool)
    committed_NS.scatter_(1, batch.window(row_N), is_committed_NK)
    missing = width - batch.canvas.length
    ids_NS, is_committed_NS, logp_NS = (
        functional.pad(tensor_NS, (0, missing)).cpu()
        for tensor_NS in (batch.canvas.input_BS[row_N], committed_NS, batch.logp_BS[row_N])
    )
    rows = index_B[row_N.cpu()].tolist()
    return StepEvent(rows, batch.step_B[row_N].cpu() - 1, ids_NS, is_committed_NS, logp_NS)
