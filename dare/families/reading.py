"""Training forwards: which hidden states are read, and what the last layer leaves out because of it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dare.families.layers.attention import Packed, Read, SharedContext, Visible
from dare.families.layers.moe import ExpertLoad
from dare.families.network import Network


def states_at(
    network: Network,
    ids_BT: Tensor,
    position_BT: Tensor,
    visible: Tensor | SharedContext | None,
    is_counted_BT: Tensor,
    is_read_BT: Tensor,
    load: ExpertLoad | None,
    real_BT: Tensor | None,
) -> Tensor:
    """[B, T, D]: the final states at `is_read_BT`, 0 elsewhere. In the last layer all else is keys and values only.

    is_counted_BT  tokens whose experts are added to `load`: real ones of noisy streams, because how many clean streams
                   there are depends on how views are packed
    real_BT        the positions that are not padding, to be run end to end; None: padding is run too
    """
    place_BT = is_read_BT = _or_first(is_read_BT, is_counted_BT)
    seen: Visible = visible
    if real_BT is not None:
        seen = packed = Packed.of(real_BT, visible)
        ids_BT, position_BT, is_counted_BT, is_read_BT = (
            packed.pack(part_BT) for part_BT in (ids_BT, position_BT, is_counted_BT, is_read_BT)
        )
    read = read_at(is_read_BT, seen)
    with nullcontext() if load is None else load.counting(network, is_counted_BT, is_read_BT):
        hidden_1ND: Tensor = network(ids_BT, position_BT, seen, None, read)
    zero_BTD = torch.zeros((*place_BT.shape, hidden_1ND.shape[-1]), dtype=hidden_1ND.dtype, device=hidden_1ND.device)
    return zero_BTD.index_put((place_BT,), hidden_1ND[0])


def read_at(is_read_BT: Tensor, visible: Visible) -> Read:
    """The states at True positions, row by row. Where attention is a mask, no other query attends in the last layer.

    Rows with fewer of them run some others along; in streams that share a context and in packed documents all attend.
    """
    batch_size, length = is_read_BT.shape
    num_columns = int(is_read_BT.sum(-1).max())
    if num_columns == length or not (visible is None or isinstance(visible, Tensor)):
        return Read(batch_size, None, is_read_BT.flatten().nonzero()[:, 0])
    column_BQ = (~is_read_BT).int().argsort(dim=-1, stable=True)[:, :num_columns]
    return Read(batch_size, column_BQ, is_read_BT.gather(1, column_BQ).flatten().nonzero()[:, 0])


def sources_of(source_BS: Tensor, is_read_BS: Tensor) -> Tensor:
    """bool [B, S]: the positions whose state some read position takes, where position i takes that of `source_BS`."""
    num_BS = torch.zeros_like(source_BS).scatter_add(1, source_BS, is_read_BS.long())
    return num_BS > 0


def _or_first(is_read_BT: Tensor, is_real_BT: Tensor) -> Tensor:
    """The read positions, or without any the first real one: a forward whose result nobody reads still has a graph."""
    if bool(is_read_BT.any()):
        return is_read_BT
    is_real_N = is_real_BT.flatten()
    return (is_real_N & (is_real_N.cumsum(0) == 1)).view_as(is_real_BT)
