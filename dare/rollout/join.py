"""Traces of several rollouts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from dare.core.types import GIVEN, Canvas, Drafts, Edits, TraceBatch, Tree


def join_traces(traces: Sequence[TraceBatch], layout: Canvas, pad_id: int) -> TraceBatch:
    """The rows of all traces, in order, as if they had been denoised together.

    They must come from one rollout: equal decode options and weights. `layout` is the canvas that the rollout of all
    rows begins with; columns that a narrower trace lacks are padding.
    """
    first = traces[0]
    width = max(trace.canvas.length for trace in traces)
    starts = [0]
    for trace in traces:
        starts.append(starts[-1] + trace.canvas.batch_size)
    return replace(
        first,
        canvas=_join_canvases([trace.canvas for trace in traces], layout, width, pad_id),
        step_map_BS=_stack([trace.step_map_BS for trace in traces], width, GIVEN),
        logp_BS=_stack([trace.logp_BS for trace in traces], width, 0),
        nfe_B=torch.cat([trace.nfe_B for trace in traces]),
        is_eos_B=torch.cat([trace.is_eos_B for trace in traces]),
        sample_id_B=torch.cat([trace.sample_id_B for trace in traces]),
        edits=_join_edits(traces, starts),
        drafts=_join_drafts(traces, starts, width, pad_id),
        tree=_join_trees(traces, starts, width, pad_id),
    )


def _join_canvases(canvases: list[Canvas], layout: Canvas, width: int, pad_id: int) -> Canvas:
    return Canvas(
        input_BS=_stack([canvas.input_BS for canvas in canvases], width, pad_id),
        is_completion_BS=_stack([canvas.is_completion_BS for canvas in canvases], width, False),
        is_real_BS=_stack([canvas.is_real_BS for canvas in canvases], width, False),
        block_BS=layout.block_BS[:, :width],
        attention=layout.attention,
    )


def _join_edits(traces: Sequence[TraceBatch], starts: list[int]) -> Edits | None:
    parts = [(trace.edits, start) for trace, start in zip(traces, starts[:-1], strict=True)]
    moved = [replace(edits, row_E=edits.row_E + start) for edits, start in parts if edits is not None]
    return Edits.joined(moved) if moved else None


def _join_drafts(traces: Sequence[TraceBatch], starts: list[int], width: int, pad_id: int) -> Drafts | None:
    parts = [(trace.drafts, start) for trace, start in zip(traces, starts[:-1], strict=True)]
    found = [replace(drafts, sample_D=drafts.sample_D + start) for drafts, start in parts if drafts is not None]
    if not found:
        return None
    fills = {"seen_DS": pad_id, "draft_DS": pad_id, "logp_DS": 0}
    return Drafts(
        **{
            field.name: _stack([getattr(part, field.name) for part in found], width, fills[field.name])
            if field.name in fills
            else torch.cat([getattr(part, field.name) for part in found])
            for field in fields(Drafts)
        }
    )


def _join_trees(traces: Sequence[TraceBatch], starts: list[int], width: int, pad_id: int) -> Tree | None:
    parts, num_nodes = [], 0
    for trace, start in zip(traces, starts[:-1], strict=True):
        tree = trace.tree
        if tree is None:
            continue
        parent_N = torch.where(tree.parent_N < 0, -1, tree.parent_N + num_nodes)
        parts.append(replace(tree, parent_N=parent_N, sample_N=tree.sample_N + start))
        num_nodes += len(parent_N)
    if not parts:
        return None
    return Tree(
        state_NS=_stack([tree.state_NS for tree in parts], width, pad_id),
        parent_N=torch.cat([tree.parent_N for tree in parts]),
        sample_N=torch.cat([tree.sample_N for tree in parts]),
        is_leaf_N=torch.cat([tree.is_leaf_N for tree in parts]),
    )


def _stack(tensors: list[Tensor], width: int, fill: float) -> Tensor:
    return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])
