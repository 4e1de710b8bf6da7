"""Predictions: what every step thought of its open positions, collected while a rollout runs."""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.predictions import NO_QUOTA, Predictions
from dare.rollout.batch import Batch
from dare.rollout.candidates import Candidates

_OPEN = (
    "row_P",
    "step_P",
    "position_P",
    "held_P",
    "token_P",
    "prob_P",
    "score_P",
    "is_written_P",
    "top_PA",
    "top_prob_PA",
)
_STEPS = ("row_D", "step_D", "start_D", "quota_D")
_REMASKED = ("row_M", "step_M", "position_M")


class PredictionLog:
    """The predictions of a rollout so far."""

    def __init__(self, num_alternatives: int) -> None:
        self.num_alternatives = num_alternatives
        self._open: list[tuple[Tensor, ...]] = []
        self._steps: list[tuple[Tensor, ...]] = []
        self._remasked: list[tuple[Tensor, ...]] = []

    def add_open(
        self,
        batch: Batch,
        row_N: Tensor,
        position_N: Tensor,
        held_N: Tensor,
        found: Candidates,
        score_N: Tensor,
        is_written_N: Tensor,
    ) -> None:
        """The open positions of one step, the tokens that they held before it, and which of them it wrote."""
        entries = (batch.step_B[row_N], position_N, held_N, found.token_N, found.prob_N, score_N.float(), is_written_N)
        tensors = (*entries, found.top_NA, found.top_prob_NA)
        self._open.append((row_N.cpu(), *(tensor.cpu() for tensor in tensors)))

    def add_steps(self, batch: Batch, row_H: Tensor, quota_H: Tensor | None, is_step_H: Tensor) -> None:
        """The rows that take a step, and what is due of them."""
        row_N = row_H[is_step_H]
        quota_N = torch.full_like(row_N, NO_QUOTA) if quota_H is None else quota_H[is_step_H]
        tensors = (batch.step_B[row_N], batch.start_B[row_N], quota_N)
        self._steps.append((row_N.cpu(), *(tensor.cpu() for tensor in tensors)))

    def add_remasked(self, batch: Batch, row_N: Tensor, position_N: Tensor) -> None:
        """Tokens that a step takes back."""
        self._remasked.append((row_N.cpu(), batch.step_B[row_N].cpu(), position_N.cpu()))

    def predictions(self) -> Predictions:
        """Everything collected, in order."""
        fields: dict[str, Tensor] = {}
        for names, parts in ((_OPEN, self._open), (_STEPS, self._steps), (_REMASKED, self._remasked)):
            if not parts:
                fields |= {name: torch.zeros(0, dtype=torch.int64) for name in names}
                continue
            fields |= {name: torch.cat(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}
        return Predictions(**fields).sorted()
