"""Drafts: the full prediction of every denoising step, collected while a rollout runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dare.core.errors import DareError
from dare.core.rng import Draws
from dare.core.types import Drafts
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.candidates import Candidates, propose
from dare.rollout.forward import Hidden
from dare.rollout.meter import Meter
from dare.rollout.plan import Plan


def check_drafts(plan: Plan) -> None:
    """Raise DareError for decode options under which a step does not predict all it could, or predicts more."""
    if plan.decode.edit_threshold is not None:
        raise DareError(
            "a draft fills masks in, but edits replace tokens",
            where="decode.edit_threshold",
            got=plan.decode.edit_threshold,
            fix="remove edit_threshold",
        )
    if plan.cache in ("prefix", "dual") or plan.decode.cfg_scale:
        raise DareError(
            "drafts need a plain forward of the whole canvas at every step",
            where="decode",
            got=f"cache {plan.cache}, cfg_scale {plan.decode.cfg_scale}",
            fix="set cache: auto and cfg_scale: 0",
        )


class DraftLog:
    """The drafts of a rollout so far."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(
        self,
        family: Family,
        batch: Batch,
        plan: Plan,
        key: Draws,
        row_H: Tensor,
        is_masked_HK: Tensor,
        hidden: Hidden,
        found: Candidates,
        meter: Meter,
    ) -> None:
        """One step, before it commits anything: `found` are the candidates at `is_masked_HK`.

        Under full attention the masked positions after the current block get candidates too, each with the random
        number that is its own at this step.
        """
        place_N, column_N = is_masked_HK.nonzero(as_tuple=True)
        seen_HS = batch.canvas.input_BS[row_H]
        draft_HS, logp_HS = seen_HS.clone(), torch.zeros_like(seen_HS, dtype=torch.float32)
        position_N = batch.window(row_H)[place_N, column_N]
        draft_HS[place_N, position_N], logp_HS[place_N, position_N] = found.token_N, found.logp_N
        is_step_H = is_masked_HK.any(-1)
        if hidden.whole_HSD is not None:
            is_rest_HS = (draft_HS == batch.mask_id) & batch.canvas.is_completion_BS[row_H] & is_step_H[:, None]
            place_N, position_N = is_rest_HS.nonzero(as_tuple=True)
            if len(place_N):
                row_N = row_H[place_N]
                uniform_N = key.fold("token").uniform(batch.sample_id_B[row_N], position_N, batch.step_B[row_N])
                rest = propose(family, plan, hidden.whole_HSD[place_N, position_N], None, uniform_N, meter)
                draft_HS[place_N, position_N], logp_HS[place_N, position_N] = rest.token_N, rest.logp_N
        row_D = row_H[is_step_H]
        part = (batch.step_B[row_D], seen_HS[is_step_H], draft_HS[is_step_H], logp_HS[is_step_H])
        self._parts.append((row_D.cpu(), *(tensor.cpu() for tensor in part)))

    def drafts(self, width: int) -> Drafts:
        """Everything collected, on canvases of `width` columns, on the CPU."""
        sample, step, *wide = zip(*self._parts, strict=True)
        seen_DS, draft_DS, logp_DS = (
            torch.cat([functional.pad(part, (0, max(0, width - part.shape[1])))[:, :width] for part in parts])
            for parts in wide
        )
        sample_D = torch.cat(sample)
        # Sorted, so that the order of the steps of different rows says nothing about how they were batched.
        step_D = torch.cat(step)
        order_D = torch.argsort(sample_D * (int(step_D.max()) + 1) + step_D)
        return Drafts(
            sample_D[order_D],
            step_D[order_D],
            seen_DS[order_D],
            draft_DS[order_D],
            logp_DS[order_D],
            torch.zeros(len(order_D)),
        )
