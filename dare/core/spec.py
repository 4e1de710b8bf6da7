"""Everything by which families differ, besides the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockGrid = Literal["sequence", "completion"]


@dataclass(frozen=True)
class FamilySpec:
    """A family's identity: special tokens, attention, block grid, limits."""

    name: str
    attention: Literal["full", "block_causal"]
    block_grid: BlockGrid
    block_length: int  # the grid the checkpoint was trained with; for a full-attention family only a default
    is_shifted: bool  # raw logits at position i score token i + 1; undone inside the family
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int  # rows of the embedding and of the head
    max_length: int
    sft_preset: str = "llada"  # the supervised objective it was trained with: a row of `sft_presets.PRESETS`
