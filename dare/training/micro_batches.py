"""How views are cut into forwards: by length, so that little of a micro-batch is padding."""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.recipe import TrainRecipe
from dare.data.packing import packs


def forwards(length_R: Tensor, train: TrainRecipe) -> list[Tensor]:
    """int64 indices of all views in parts of one forward each, as the recipe says: packs, or micro-batches."""
    if train.pack_length is not None:
        return [torch.tensor(pack) for pack in packs(length_R.tolist(), train.pack_length)]
    return micro_batches(length_R, max_views=train.micro_batch_views, max_tokens=train.micro_batch_tokens)


def micro_batches(length_R: Tensor, *, max_views: int, max_tokens: int) -> list[Tensor]:
    """int64 indices of all views, each in one part; a part has at most `max_views` views and `max_tokens` positions.

    Longest first, so that memory runs out in the first part or not at all; views of equal length keep their order, so
    those of one sample stay together. Positions include padding to the longest view of the part; a single view that is
    longer is a part of its own.
    """
    order_R = length_R.argsort(descending=True, stable=True)
    parts, start = [], 0
    while start < len(order_R):
        longest = max(1, int(length_R[order_R[start]]))
        stop = start + max(1, min(max_views, max_tokens // longest))
        parts.append(order_R[start:stop])
        start = stop
    return parts
