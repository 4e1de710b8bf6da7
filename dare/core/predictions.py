"""What every denoising step of a rollout thought of the positions that were open to it, and what it did with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

NO_QUOTA = -1  # the unmask policy itself decides how many tokens a step commits


@dataclass
class Predictions:
    """P open positions of D steps in all, with A alternatives each; M tokens went back to masks. All on the CPU.

    Ordered by row, step and position, so nothing here says how rows were batched.

    row_P        int64    row of the trace
    step_P       int64    0-based denoising step of that row
    position_P   int64    position in its canvas
    held_P       int64    the token that stood there before the step: the mask id, or a token that may be edited
    token_P      int64    the candidate
    prob_P       float32  its probability at temperature 1, with the mask token in the normaliser
    score_P      float32  what the unmask policy ranked it by
    is_written_P bool     whether the step wrote it into the canvas
    top_PA       int64    the A most probable tokens that may be produced, the most probable first
    top_prob_PA  float32  their probabilities, as `prob_P`
    row_D, step_D         int64  the steps
    start_D      int64    first position of the block that the step worked on
    quota_D      int64    tokens that were due at the step, or, where tokens may be masked again, due by it in the
                          block; NO_QUOTA where the policy decides
    row_M, step_M, position_M  int64  tokens that the step masked again
    """

    row_P: Tensor
    step_P: Tensor
    position_P: Tensor
    held_P: Tensor
    token_P: Tensor
    prob_P: Tensor
    score_P: Tensor
    is_written_P: Tensor
    top_PA: Tensor
    top_prob_PA: Tensor
    row_D: Tensor
    step_D: Tensor
    start_D: Tensor
    quota_D: Tensor
    row_M: Tensor
    step_M: Tensor
    position_M: Tensor

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axis = field.name.rpartition("_")[2]
            length = len(getattr(self, {"PA": "row_P"}.get(axis, f"row_{axis}")))
            if len(getattr(self, field.name)) != length:
                raise ValueError(f"Predictions.{field.name}: {len(getattr(self, field.name))} entries, not {length}")

    def tensors(self) -> dict[str, Tensor]:
        """Every field by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def sorted(self) -> Predictions:
        """The same entries in order of row, step and position."""
        changes: dict[str, Tensor] = {}
        for axis, keys in (
            ("P", ("position", "step", "row")),
            ("D", ("step", "row")),
            ("M", ("position", "step", "row")),
        ):
            order = torch.arange(len(getattr(self, f"row_{axis}")))
            for key in keys:  # stable sorts, the last one is the major key
                order = order[getattr(self, f"{key}_{axis}")[order].argsort(stable=True)]
            for name, tensor in self.tensors().items():
                if name.endswith((f"_{axis}", f"_{axis}A")):
                    changes[name] = tensor[order]
        return Predictions(**changes)
