"""What a rollout remembers, read back: the canvas before any step, the scored positions, the completions.

A step map is enough to rebuild every canvas bit for bit where a committed token never changes: before step t a row
holds the tokens of steps < t and masks everywhere else in its completion. A rollout that edits also keeps the tokens
that it replaced, with the steps between which each of them stood. Under `decode.remask` tokens go back to masks: the
step map then says when a token took its final value, and only the rollout's drafts hold what each step read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.core.text import Completion
from dare.core.types import Drafts, TraceBatch

if TYPE_CHECKING:
    from torch import Tensor


def num_steps(trace: TraceBatch) -> int:
    """Denoising steps of the row that took most."""
    return int(trace.nfe_B.max())


def canvas_before(trace: TraceBatch, step: int) -> Tensor:
    """int64 [B, S]: what each row's own denoising step `step` (0-based) read, bit for bit.

    Rows that took fewer steps are at their final canvas. Positions never sampled hold the mask token there already.
    Raises ValueError for a trace in which committed tokens were masked again.
    """
    if trace.decode.get("remask", "none") != "none":
        raise ValueError("a step map does not say what was masked again; record drafts")
    ids_BS = torch.where(trace.step_map_BS >= step, trace.mask_id, trace.canvas.input_BS)
    edits = trace.edits
    if edits is not None:
        stood_E = (edits.since_E < step) & (step <= edits.until_E)
        ids_BS[edits.row_E[stood_E], edits.position_E[stood_E]] = edits.token_E[stood_E]
    return ids_BS


def is_eos(ids: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """bool, in the shape of `ids`: whether each token is one of `eos_ids`."""
    return torch.isin(ids, torch.tensor(eos_ids, device=ids.device))


def has_eos(trace: TraceBatch) -> Tensor:
    """bool [B]: whether the completion contains an EOS token."""
    return (is_eos(trace.canvas.input_BS, trace.eos_ids) & trace.canvas.is_completion_BS).any(-1)


def scored_mask(trace: TraceBatch) -> Tensor:
    """bool [B, S]: completion positions through the first EOS inclusive, all of them if there is no EOS."""
    is_completion_BS = trace.canvas.is_completion_BS
    is_eos_BS = (is_eos(trace.canvas.input_BS, trace.eos_ids) & is_completion_BS).long()
    return is_completion_BS & (is_eos_BS.cumsum(-1) == is_eos_BS)


def to_completions(trace: TraceBatch) -> list[Completion]:
    """One completion per row, in order, cut after the first EOS; `text` is None."""
    is_scored_BS = scored_mask(trace)
    length_B = is_scored_BS.sum(-1).tolist()
    tokens = trace.canvas.input_BS[is_scored_BS].tolist()
    steps = trace.step_map_BS[is_scored_BS].tolist()
    logps = trace.logp_BS[is_scored_BS].tolist()
    completions, start = [], 0
    for length, nfe, is_ended in zip(length_B, trace.nfe_B.tolist(), trace.is_eos_B.tolist(), strict=True):
        part = slice(start, start + length)
        finish = "eos" if is_ended else "length"
        completions.append(Completion(tokens[part], None, steps[part], logps[part], nfe, finish))
        start += length
    return completions


def draft_tokens(drafts: Drafts, trace: TraceBatch) -> list[list[int]]:
    """The completion of each draft, cut after the first EOS; positions that the step did not predict are left out."""
    is_completion_DS = trace.canvas.is_completion_BS[drafts.sample_D] & (drafts.draft_DS != trace.mask_id)
    is_eos_DS = (is_eos(drafts.draft_DS, trace.eos_ids) & is_completion_DS).long()
    is_kept_DS = is_completion_DS & (is_eos_DS.cumsum(-1) == is_eos_DS)
    return [ids_S[is_kept_S].tolist() for ids_S, is_kept_S in zip(drafts.draft_DS, is_kept_DS, strict=True)]
