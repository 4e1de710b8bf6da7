"""The rows of a call: their canvas, what was committed so far, and each row's own place in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dare.core.types import GIVEN, UNSAMPLED, Canvas, Edits


@dataclass
class Batch:
    """B rows on the family's device, written in place. Rows advance independently, block by block.

    Methods take the H rows that are denoised now, as indices, and flags for them: nothing here waits for the device.

    start_B       first position of the block that the row is in
    end_B         first position after the row's completion
    num_masked_B  masks that the row's block began with
    step_B        denoising steps that the row took
    block_step_B  those of its block
    post_step_B   those of its block that went over it when it was complete
    is_done_B     whether nothing is left to do for the row
    is_stale_B    whether the cache lacks the final tokens of the block before the current one
    stop_B        denoising steps after which the row pauses
    score_BS      the unmask policy's score of each committed token; kept where tokens may be masked again
    edits         what was replaced so far; rows are those of the batch
    """

    canvas: Canvas
    sample_id_B: Tensor
    block_length: int
    mask_id: int
    step_map_BS: Tensor
    logp_BS: Tensor
    start_B: Tensor
    end_B: Tensor
    num_masked_B: Tensor
    step_B: Tensor
    block_step_B: Tensor
    post_step_B: Tensor
    is_done_B: Tensor
    is_stale_B: Tensor
    stop_B: Tensor
    score_BS: Tensor
    edits: list[Edits] = field(default_factory=list)

    @classmethod
    def begin(cls, canvas: Canvas, sample_id_B: Tensor, block_length: int, mask_id: int) -> Batch:
        """Every row at the block that holds its first completion position."""
        is_completion_BS, block_BS = canvas.is_completion_BS, canvas.block_BS
        first_B1 = is_completion_BS.int().argmax(-1, keepdim=True)
        start_B = (block_BS < block_BS.gather(1, first_B1)).sum(-1)
        zero_B = torch.zeros_like(start_B)
        return cls(
            canvas=canvas,
            sample_id_B=sample_id_B,
            block_length=block_length,
            mask_id=mask_id,
            step_map_BS=torch.where(is_completion_BS, UNSAMPLED, GIVEN),
            logp_BS=torch.zeros_like(block_BS, dtype=torch.float32),
            start_B=start_B,
            end_B=canvas.is_real_BS.sum(-1),
            num_masked_B=start_B + block_length - first_B1[:, 0],
            step_B=zero_B,
            block_step_B=zero_B.clone(),
            post_step_B=zero_B.clone(),
            is_done_B=torch.zeros_like(zero_B, dtype=torch.bool),
            is_stale_B=torch.zeros_like(zero_B, dtype=torch.bool),
            stop_B=torch.full_like(zero_B, torch.iinfo(torch.int64).max),
            score_BS=torch.zeros_like(block_BS, dtype=torch.float32),
        )

    def put(self, row: int, other: Batch) -> None:
        """Replace a row by the only one of another batch, which is as wide as this one."""
        for mine, theirs in ((self, other), (self.canvas, other.canvas)):
            for item in dataclasses.fields(mine):
                if item.name.endswith(("_B", "_BS")):
                    getattr(mine, item.name)[row] = getattr(theirs, item.name)[0]

    def branch(self, index_H: Tensor, sample_id_H: Tensor, stop_H: Tensor) -> Batch:
        """A copy of the chosen rows, in that order, that goes on under other sample ids to another stop.

        The copy begins with a cache of its own.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name.endswith(("_B", "_BS"))]
        tensors = {name: getattr(self, name)[index_H] for name in names}
        changes = {**tensors, "canvas": self.canvas.rows(index_H), "sample_id_B": sample_id_H, "stop_B": stop_H}
        changes["is_stale_B"] = torch.zeros_like(index_H, dtype=torch.bool)
        return dataclasses.replace(self, **changes)

    def is_active(self, row_H: Tensor) -> Tensor:
        """bool [H]: whether rows have something left to do before they pause."""
        return ~self.is_done_B[row_H] & (self.step_B[row_H] < self.stop_B[row_H])

    def window(self, row_H: Tensor) -> Tensor:
        """int64 [H, K]: positions of the rows' current blocks."""
        return self.start_B[row_H, None] + torch.arange(self.block_length, device=row_H.device)

    def masked(self, row_H: Tensor) -> Tensor:
        """bool [H, K]: positions of the current blocks that hold the mask token; none in a row that is done."""
        return self.canvas.input_BS[row_H[:, None], self.window(row_H)] == self.mask_id

    def commit(self, row_H: Tensor, is_written_HK: Tensor, token_HK: Tensor, logp_HK: Tensor) -> None:
        """Fix tokens of the current blocks into the canvas, as decided by the rows' current denoising step."""
        place = (row_H[:, None], self.window(row_H))
        step_HK = self.step_B[row_H, None].expand_as(token_HK)
        for kept_BS, new_HK in (
            (self.canvas.input_BS, token_HK),
            (self.step_map_BS, step_HK),
            (self.logp_BS, logp_HK),
        ):
            kept_BS[place] = torch.where(is_written_HK, new_HK, kept_BS[place])

    def log_edits(self, row_H: Tensor, is_edited_HK: Tensor) -> None:
        """Remember the tokens that are about to be replaced by the rows' current denoising step."""
        place_N, column_N = is_edited_HK.nonzero(as_tuple=True)
        row_N = row_H[place_N]
        position_N = self.start_B[row_N] + column_N
        self.edits.append(
            Edits(
                row_E=row_N,
                position_E=position_N,
                token_E=self.canvas.input_BS[row_N, position_N],
                since_E=self.step_map_BS[row_N, position_N],
                until_E=self.step_B[row_N],
                logp_E=self.logp_BS[row_N, position_N],
            )
        )

    def mask_again(self, row_H: Tensor, is_again_HK: Tensor) -> None:
        """Take tokens of the current blocks back out of the canvas."""
        place = (row_H[:, None], self.window(row_H))
        for kept_BS, value in ((self.canvas.input_BS, self.mask_id), (self.step_map_BS, UNSAMPLED), (self.logp_BS, 0)):
            kept_BS[place] = kept_BS[place].masked_fill(is_again_HK, value)

    def count_step(self, row_H: Tensor, is_denoising_H: Tensor, has_mask_H: Tensor) -> None:
        """The rows that took part in a denoising step are at their next one."""
        self.step_B[row_H] += is_denoising_H
        self.block_step_B[row_H] += is_denoising_H
        self.post_step_B[row_H] += is_denoising_H & ~has_mask_H

    def advance(self, row_H: Tensor, is_leaving_H: Tensor) -> None:
        """Move the rows that leave their block to the next one, which is masked throughout."""
        self.start_B[row_H] += is_leaving_H * self.block_length
        self.num_masked_B[row_H] = torch.where(is_leaving_H, self.block_length, self.num_masked_B[row_H])
        self.block_step_B[row_H] *= ~is_leaving_H
        self.post_step_B[row_H] *= ~is_leaving_H

    def num_waiting(self, row_H: Tensor) -> int:
        """Masked positions of these rows that are still to be sampled, as far as is known."""
        is_waiting_HS = (self.canvas.input_BS[row_H] == self.mask_id) & ~self.is_done_B[row_H, None]
        return int(is_waiting_HS.sum())
