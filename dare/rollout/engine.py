"""The denoising loop: prompts in, traces out.

    queue -> seats, at most `batch_size` <-----------------------------+
                v                                                      |
    read the current block of every seated row -> candidates at its    |
        masks -> the unmask policy commits some; committed tokens may  |
        be edited -> rows whose block is complete (and at rest) move   |
        on to the next, or leave their seat to another -----------------+

Rows never wait for one another: each has its own block, step and random numbers, keyed by (sample id, position, step).
A completion is therefore the same in any batch, order or company.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Draws, Key
from dare.core.types import TraceBatch
from dare.diffusion import unmask
from dare.diffusion.trace import is_eos
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.candidates import propose
from dare.rollout.drafts import DraftLog, check_drafts
from dare.rollout.forward import Forward, Hidden, make_forward
from dare.rollout.live import Live
from dare.rollout.meter import Meter
from dare.rollout.plan import Plan, check_prompts, make_plan
from dare.rollout.predictions import PredictionLog
from dare.rollout.record import begin_batch, empty_trace, finished, record_rows, trace_rows, with_edits


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
    on_finished: Callable[[list[int], TraceBatch], None] | None = None,
    meter: Meter | None = None,
) -> TraceBatch:
    """One completion per prompt, in order, on the CPU.

    sample_ids   with `key`, name the random numbers of each row: equal ids and prompts give equal completions
    has_drafts   record every step's full prediction in `drafts`
    num_alternatives  record what every step thought of its open positions in `predictions`, with as many tokens for
                 each; 0 = do not
    on_step      called after every denoising step
    on_progress  called with (positions settled, all completion positions) after every denoising step
    on_finished  called with indices of prompts and their part of the trace (without edits and drafts) as rows end
    meter        counts what the rollout costs

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
    order, twins = _admission(prompts)
    meter = meter or Meter()
    meter.switch("packing")
    with plan.running(family):
        meter.switch("bookkeeping")
        batch = begin_batch(family, plan, trace, torch.arange(len(prompts)))
        live = Live(batch, order, twins, decode.batch_size)
        run = Run(family, plan, key, batch, live, log, predictions, meter)
        run.fill(trace, on_step, on_progress, on_finished)
    done = finished(with_edits(trace, batch))
    return replace(
        done,
        drafts=None if log is None else log.drafts(done.canvas.length),
        predictions=None if predictions is None else predictions.predictions(),
    )


class Step(NamedTuple):
    """What one denoising step did to the H rows that were seated.

    is_denoising_H  rows that took part
    position_HK     their blocks, which some have left by now
    is_written_HK   what was committed or replaced
    ended           rows that then came to their end or to a pause
    """

    row_H: Tensor
    is_denoising_H: Tensor
    position_HK: Tensor
    is_written_HK: Tensor
    ended: list[int]


@dataclass(frozen=True)
class Run:
    """Rows on their way through the loop; the logs, if there are any, hear of every prediction."""

    family: Family
    plan: Plan
    key: Draws
    batch: Batch
    live: Live
    log: DraftLog | None = None
    predictions: PredictionLog | None = None
    meter: Meter = field(default_factory=Meter)

    def fill(
        self,
        trace: TraceBatch,
        on_step: Callable[[StepEvent], None] | None,
        on_progress: Callable[[int, int], None] | None,
        on_finished: Callable[[list[int], TraceBatch], None] | None,
    ) -> None:
        """Denoise to the end, write finished rows into `trace`, and tell those who listen; see `denoise`."""
        batch, progress = self.batch, _Progress(self.batch, self.live)
        for step in self.steps():
            if on_step is not None:
                on_step(_event(batch, step))
            if on_progress is not None:
                on_progress(*progress.after(step))
            if step.ended:
                ended_N = torch.tensor(step.ended)
                record_rows(batch, trace, ended_N, ended_N, self.family.spec.pad_id)
                if on_finished is not None:
                    on_finished(step.ended, trace_rows(trace, step.ended))

    def steps(self) -> Iterator[Step]:
        """Denoise every row to its end, or to where it pauses."""
        live, has_drafts = self.live, self.log is not None
        forward = make_forward(self.family, self.batch, self.plan, live, self.meter, has_drafts=has_drafts)
        forward.seat(live.update())
        while live.rows:
            step = self._step(live.row_H, forward)
            change = live.update()
            yield step._replace(ended=change.left)
            forward.seat(change)

    def _step(self, row_H: Tensor, forward: Forward) -> Step:
        """One denoising step of the seated rows, without a look at who ended."""
        batch = self.batch
        position_HK = batch.window(row_H)
        is_active_H = batch.is_active(row_H)
        is_masked_HK = batch.masked(row_H) & is_active_H[:, None]
        has_mask_H = is_masked_HK.any(-1)
        is_denoising_H = has_mask_H | (is_active_H & self._may_edit(row_H))
        is_open_HK = is_masked_HK
        if self.plan.decode.edit_threshold is not None:
            is_completion_HK = batch.canvas.is_completion_BS[row_H[:, None], position_HK]
            is_open_HK = is_masked_HK | (is_completion_HK & is_denoising_H[:, None])
        place_N, column_N = is_open_HK.nonzero(as_tuple=True)
        hidden = forward.read(place_N, column_N)
        is_written_HK = self._write(row_H, is_masked_HK, is_denoising_H, (place_N, column_N), hidden)
        batch.count_step(row_H, is_denoising_H, has_mask_H)
        is_settled_H = ~has_mask_H & ~is_written_HK.any(-1)
        is_full_H = is_active_H & ~batch.masked(row_H).any(-1)
        is_complete_H = is_full_H & (is_settled_H | ~self._may_edit(row_H))
        batch.is_done_B[row_H] |= is_complete_H & self._is_terminal(row_H)
        if self.plan.has_stop_inside:
            batch.is_done_B[row_H] |= self._has_ended(row_H, is_written_HK)
        is_leaving_H = is_complete_H & ~batch.is_done_B[row_H]
        # A step that read the block as it now is has thereby stored it.
        batch.is_stale_B[row_H] |= is_leaving_H & ~is_settled_H
        batch.advance(row_H, is_leaving_H)
        return Step(row_H, is_denoising_H, position_HK, is_written_HK, [])

    def _may_edit(self, row_H: Tensor) -> Tensor:
        """bool [H]: whether another step may go over the row's block if that is complete."""
        batch = self.batch
        return ~batch.is_done_B[row_H] & (batch.post_step_B[row_H] < self.plan.max_post_steps)

    def _write(
        self,
        row_H: Tensor,
        is_masked_HK: Tensor,
        is_denoising_H: Tensor,
        open_N: tuple[Tensor, Tensor],
        hidden: Hidden,
    ) -> Tensor:
        """bool [H, K]: the positions that this step commits or edits; the batch holds their new tokens afterwards."""
        batch, decode, (place_N, column_N) = self.batch, self.plan.decode, open_N
        row_N = row_H[place_N]
        position_N = batch.start_B[row_N] + column_N
        counters = (batch.sample_id_B[row_N], position_N, batch.step_B[row_N])
        uniform_N = self.key.fold("token").uniform(*counters)
        states = (hidden.plain_ND, hidden.unconditional_ND)
        num_alternatives = self.predictions.num_alternatives if self.predictions is not None else 0
        found = propose(self.family, self.plan, *states, uniform_N, self.meter, num_alternatives)
        if self.log is not None:
            self.log.add(self.family, batch, self.plan, self.key, row_H, is_masked_HK, hidden, found, self.meter)
        score_N = found.score_N
        if unmask.find_policy(decode.unmask).score == "uniform":
            score_N = self.key.fold("unmask").uniform(*counters)
        if decode.unmask_temperature:
            score_N = unmask.drawn_order(score_N, decode.unmask_temperature, self.key.fold("unmask").uniform(*counters))
        if decode.eos_discount is not None:
            progress_N = unmask.progress(decode.schedule, self.plan.num_steps, batch.block_step_B[row_N])
            factor_N = decode.eos_discount + (1.0 - decode.eos_discount) * progress_N
            score_N = torch.where(is_eos(found.token_N, self.family.spec.eos_ids), score_N * factor_N, score_N)

        def spread(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(is_masked_HK.shape).index_put((place_N, column_N), value_N)

        held_N = batch.canvas.input_BS[row_N, position_N]
        is_written_HK = self._choose(row_H, spread(score_N), is_masked_HK, is_denoising_H)
        token_HK = spread(found.token_N)
        if decode.edit_threshold is not None:
            is_sure_HK = spread((held_N != found.token_N) & (found.confidence_N > decode.edit_threshold))
            is_edited_HK = is_sure_HK & ~is_masked_HK
            batch.log_edits(row_H, is_edited_HK)
            is_written_HK |= is_edited_HK
        if self.predictions is not None:
            is_written_N = is_written_HK[place_N, column_N]
            self.predictions.add_open(batch, row_N, position_N, held_N, found, score_N, is_written_N)
        batch.commit(row_H, is_written_HK, token_HK, spread(found.logp_N))
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
        kept_HK = batch.score_BS[place_HK, window_HK]
        batch.score_BS[place_HK, window_HK] = torch.where(is_committed_HK, score_HK.float(), kept_HK)
        batch.mask_again(row_H, is_again_HK)
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


def _admission(prompts: list[list[int]]) -> tuple[list[int], list[int]]:
    """The order in which rows are admitted, equal lengths and equal prompts together, and for each row its prompt."""
    number: dict[tuple[int, ...], int] = {}
    twins = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), twins[row]))
    return order, twins


class _Progress:
    """Counts settled positions: all of the rows that ended, and of the seated ones what is not masked."""

    def __init__(self, batch: Batch, live: Live) -> None:
        self.batch, self.live = batch, live
        self.count = batch.canvas.is_completion_BS.sum(-1).tolist()
        self.num_ended = 0

    def after(self, step: Step) -> tuple[int, int]:
        """(positions settled, all completion positions)."""
        self.num_ended += sum(self.count[row] for row in step.ended)
        num_seated = sum(self.count[row] for row in self.live.rows)
        return self.num_ended + num_seated - self.batch.num_waiting(self.live.row_H), sum(self.count)


def _event(batch: Batch, step: Step) -> StepEvent:
    """What the rows that took part just committed."""
    row_N = step.row_H[step.is_denoising_H]
    position_NK, is_written_NK = step.position_HK[step.is_denoising_H], step.is_written_HK[step.is_denoising_H]
    is_committed_NS = torch.zeros_like(batch.step_map_BS[row_N], dtype=torch.bool)
    is_committed_NS.scatter_(1, position_NK, is_written_NK)
    ids_NS, logp_NS = batch.canvas.input_BS[row_N].cpu(), batch.logp_BS[row_N].cpu()
    return StepEvent(row_N.tolist(), batch.step_B[row_N].cpu() - 1, ids_NS, is_committed_NS.cpu(), logp_NS)
