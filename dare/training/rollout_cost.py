"""What a rollout asks of the network: how many tokens, from its plan alone, and seconds, from a measured forward."""

from __future__ import annotations

import torch

from dare.core.types import Canvas
from dare.families.base import Family
from dare.families.layers.attention import Read
from dare.rollout.plan import Plan

_MAX_POSITIONS = 512  # of the measured forward: enough to be no slower per token than a large one on a CPU


def rollout_tokens(plan: Plan, canvas: Canvas, group_size: int) -> int:
    """Tokens that go through the network for completions of equally long prompts, `group_size` of each prompt.

    Exact for schedules and completions that nothing ends early, on whole blocks; a policy without a schedule may need
    fewer steps. What `dare.rollout` computes once for a group counts once.
    """
    num_rows, width, size = canvas.batch_size, canvas.length, plan.block_length
    first = int(canvas.is_completion_BS[0].int().argmax())
    start = int((canvas.block_BS[0] < canvas.block_BS[0, first]).sum())
    num_blocks, num_steps = (width - start) // size, plan.num_steps
    num_prompts = num_rows // group_size
    if plan.cache == "block":
        return num_prompts * start + num_rows * (num_blocks * (num_steps + 1) - 1) * size
    if plan.cache == "none":
        return width * (num_prompts + num_rows * (num_blocks * num_steps - 1))
    refreshed = width * (num_prompts + num_rows * (num_blocks - 1))
    lengths = [size if plan.cache == "dual" else width - start - block * size for block in range(num_blocks)]
    return refreshed + num_rows * (num_steps - 1) * sum(lengths)


def forward_shape(plan: Plan, canvas: Canvas) -> tuple[int, int]:
    """Rows and columns of a forward like those that most of the rollout consists of, of a bounded size."""
    columns = canvas.length if plan.cache in ("none", "prefix") else plan.block_length
    rows = min(canvas.batch_size, plan.decode.batch_size, _MAX_POSITIONS // columns)
    return max(1, rows), columns


def run_forward(family: Family, num_rows: int, num_columns: int) -> None:
    """One forward of such a shape, logits at every other position: half of a block is masked on average."""
    device = family.device
    ids_BT = torch.zeros((num_rows, num_columns), dtype=torch.int64, device=device)
    position_BT = torch.arange(num_columns, device=device).expand_as(ids_BT)
    read = Read(num_rows, None, torch.arange(0, ids_BT.numel(), 2, device=device))
    with torch.no_grad():
        family.row_logits(family.hidden_at(ids_BT, position_BT, None, None, read))
