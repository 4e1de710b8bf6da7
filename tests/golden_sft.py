"""The stored numbers of public supervised training, one case at a time, and samples made of plain rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.core.types import Canvas, Samples

FOLDER = Path(__file__).parent / "golden" / "sft"
MASK, EOS = 126, 120
RTOL = 5e-5  # of their losses


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All cases of a file: metadata, and tensors under CASE/TENSOR."""
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def case(file: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One case of a file."""
    facts, tensors = load(file)
    prefix = f"{name}/"
    return facts[name], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def samples_of(input_BS: Tensor, is_scored_BS: Tensor, *, block_length: int | None = None) -> Samples:
    """Rows without a prompt or padding."""
    every_BS = torch.ones_like(is_scored_BS)
    block_BS = (torch.arange(input_BS.shape[1]) // (block_length or input_BS.shape[1])).expand_as(input_BS).contiguous()
    return Samples(
        canvas=Canvas(input_BS, every_BS, every_BS, block_BS, "full" if block_length is None else "block_causal"),
        is_scored_BS=is_scored_BS,
        sample_id_B=torch.arange(len(input_BS)),
        advantage_B=torch.ones(len(input_BS)),
        group_B=torch.arange(len(input_BS)),
        mask_id=MASK,
        eos_ids=(EOS,),
    )
