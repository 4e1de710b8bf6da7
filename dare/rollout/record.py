"""Traces before and after a rollout: laid out empty, filled batch by batch, cut where rows ended."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dare.core.errors import NonFiniteError
from dare.core.types import GIVEN, Canvas, Edits, TraceBatch
from dare.diffusion.trace import has_eos
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.plan import Plan


def empty_trace(family: Family, plan: Plan, canvas: Canvas, sample_ids: list[int], weights_version: int) -> TraceBatch:
    """The trace of a rollout that has not begun, on the CPU."""
    sample_id_B = torch.tensor(sample_ids)
    return TraceBatch(
        canvas=canvas,
        step_map_BS=torch.full_like(canvas.input_BS, GIVEN),
        logp_BS=torch.zeros(canvas.input_BS.shape),
        nfe_B=torch.zeros_like(sample_id_B),
        is_eos_B=torch.zeros_like(sample_id_B, dtype=torch.bool),
        sample_id_B=sample_id_B,
        mask_id=family.spec.mask_id,
        eos_ids=family.spec.eos_ids,
        temperature=plan.decode.temperature,
        is_exact=plan.cache in ("none", "block"),
        weights_version=weights_version,
        decode=plan.decode.model_dump(mode="json"),
        edits=None if plan.decode.edit_threshold is None else Edits.joined([]),
    )


def begin_batch(family: Family, plan: Plan, trace: TraceBatch, index_B: Tensor) -> Batch:
    """The chosen rows on the family's device, no wider than they need to be."""
    rows = trace.canvas.rows(index_B)
    width = int(rows.is_real_BS.any(0).sum())
    canvas = _columns(rows, width, family.device)
    sample_id_B = trace.sample_id_B[index_B].to(family.device)
    return Batch.begin(canvas, sample_id_B, plan.block_length, family.spec.mask_id)


def record_rows(batch: Batch, trace: TraceBatch, row_N: Tensor, index_N: Tensor, pad_id: int) -> None:
    """Write the finished rows `row_N` of a batch into the rows `index_N` of the trace.

    A blockwise row ends with its last block: what lies beyond becomes padding. In a row with full attention it stays
    masked, because the tokens before it were committed in its sight.
    Raises NonFiniteError if the network's output was not finite.
    """
    row_N = row_N.to(batch.start_B.device)
    logp_NS = batch.logp_BS[row_N].cpu()
    if not bool(logp_NS.isfinite().all()):
        raise NonFiniteError(
            "the network's output is not finite", where="rollout", fix="load a checkpoint with finite weights"
        )
    width = batch.canvas.length
    ids_NS, step_map_NS = batch.canvas.input_BS[row_N].cpu(), batch.step_map_BS[row_N].cpu()
    if batch.canvas.is_blockwise:
        end_N = (batch.start_B[row_N] + batch.block_length).cpu()
        is_beyond_NS = torch.arange(width) >= end_N[:, None]
        ids_NS = ids_NS.masked_fill(is_beyond_NS, pad_id)
        step_map_NS = step_map_NS.masked_fill(is_beyond_NS, GIVEN)
        trace.canvas.is_real_BS[index_N, :width] &= ~is_beyond_NS
        trace.canvas.is_completion_BS[index_N, :width] &= ~is_beyond_NS
    trace.canvas.input_BS[index_N, :width] = ids_NS
    trace.step_map_BS[index_N, :width] = step_map_NS
    trace.logp_BS[index_N, :width] = logp_NS
    trace.nfe_B[index_N] = batch.step_B[row_N].cpu()


def with_edits(trace: TraceBatch, batch: Batch) -> TraceBatch:
    """The trace with the edits of a batch of the same rows, if the rollout could edit."""
    if trace.edits is None:
        return trace
    fields = [field.name for field in dataclasses.fields(Edits)]
    parts = [Edits(**{name: getattr(part, name).cpu() for name in fields}) for part in batch.edits]
    return dataclasses.replace(trace, edits=Edits.joined(parts))


def trace_rows(trace: TraceBatch, rows: list[int]) -> TraceBatch:
    """Finished rows of a trace as a trace of their own, without edits."""
    index_N = torch.tensor(rows)
    names = ("step_map_BS", "logp_BS", "nfe_B", "is_eos_B", "sample_id_B")
    chosen = {name: getattr(trace, name)[index_N] for name in names}
    return finished(dataclasses.replace(trace, canvas=trace.canvas.rows(index_N), edits=None, **chosen))


def finished(trace: TraceBatch) -> TraceBatch:
    """The trace without columns that are padding in every row, and with `is_eos_B` filled in."""
    width = int(trace.canvas.is_real_BS.any(0).sum())
    narrow = dataclasses.replace(
        trace,
        canvas=_columns(trace.canvas, width, torch.device("cpu")),
        step_map_BS=trace.step_map_BS[:, :width],
        logp_BS=trace.logp_BS[:, :width],
    )
    return dataclasses.replace(narrow, is_eos_B=has_eos(narrow))


def _columns(canvas: Canvas, width: int, device: torch.device) -> Canvas:
    """A copy of the first columns on a device."""
    tensors = (canvas.input_BS, canvas.is_completion_BS, canvas.is_real_BS, canvas.block_BS)
    input_BS, is_completion_BS, is_real_BS, block_BS = (tensor[:, :width].to(device, copy=True) for tensor in tensors)
    return Canvas(input_BS, is_completion_BS, is_real_BS, block_BS, canvas.attention)
