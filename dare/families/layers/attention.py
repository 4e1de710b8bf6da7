"""Attention over an optional cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dare.families.layers.rope import Rotation, rotate


class KVCache:
    """Rotated keys and values of B rows, written in place: per layer two tensors [B, S, Hkv, hd]. Slot = position."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, length, num_kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def places(self, slot_BT: Tensor, row_B: Tensor | None = None) -> Tensor:
        """int64 [B * T]: where `write` puts what belongs to `slot_BT` of the rows `row_B` (default: all)."""
        row_B = torch.arange(len(slot_BT), device=slot_BT.device) if row_B is None else row_B
        return (row_B[:, None] * self.length + slot_BT).flatten()

    def write(self, layer: int, key_BHTd: Tensor, value_BHTd: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values at `places`; the layer, [B, Hkv, S, hd]."""
        keys, values = self.keys[layer], self.values[layer]
        for stored, new_BHTd in ((keys, key_BHTd), (values, value_BHTd)):
            stored.flatten(0, 1).index_copy_(0, place_N, new_BHTd.transpose(1, 2).flatten(0, 1))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def attend(
        self, layer: int, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, place_N: Tensor, visible: Visible
    ) -> Tensor:
        """[B, H, T, hd]: `CacheRows.attend` of all rows on all slots."""
        key, value = self.write(layer, key_BHTd, value_BHTd, place_N)
        return attend(query_BHTd, key, value, visible)

    def copy_rows(self, target_N: Tensor, source_N: Tensor, length: int) -> None:
        """The first `length` slots of the rows `source_N`, as they are now, into the rows `target_N`."""
        for stored in (*self.keys, *self.values):
            stored[target_N, :length] = stored[source_N, :length]


@dataclass(frozen=True)
class CacheRows:
    """The part of a cache that one call works on: row b of the call is row `row_B[b]` of the cache.

    A call first writes the keys and values of its tokens, then attends to what each row holds, the tokens just
    written included. Which slots a query may see is the caller's `visible` mask, so a noisy block can be written and
    later overwritten by its clean version.

    num_first  the first rows of the call are the first rows of the cache, in order: they are read where they lie
    width      slots that are read
    is_fresh   the call's own tokens are all that its rows see, so nothing is read back
    """

    cache: KVCache
    row_B: Tensor
    num_first: int
    width: int
    is_fresh: bool = False

    def places(self, slot_BT: Tensor) -> Tensor:
        """int64 [B * T]: where the cache holds the tokens of the call."""
        return self.cache.places(slot_BT, self.row_B)

    def attend(
        self, layer: int, query_RHQd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, place_N: Tensor, visible: Visible
    ) -> Tensor:
        """[R, H, Q, hd]: the queries of the call's first R rows, after the keys and values of all rows are stored."""
        keys, values = self.cache.write(layer, key_BHTd, value_BHTd, place_N)
        num_rows = len(query_RHQd)
        if not num_rows:
            return query_RHQd
        if self.is_fresh:
            return attend(query_RHQd, key_BHTd[:num_rows], value_BHTd[:num_rows], visible)
        num_first, parts = min(self.num_first, num_rows), []
        for start, stop, index in (
            (0, num_first, slice(0, num_first)),
            (num_first, num_rows, self.row_B[num_first:num_rows]),
        ):
            if start < stop:
                key, value = (stored[:, :, : self.width][index] for stored in (keys, values))
                parts.append(attend(query_RHQd[start:stop], key, value, _rows(visible, start, stop)))
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class Cache(Protocol):
    """What a layer asks of a cache: `KVCache`, rows of one (`CacheRows`), or the plain one of `dare bench`."""

    def places(self, slot_BT: Tensor, /) -> Tensor:
        """int64 [B * T]: where the keys and values of a call's tokens go; asked once for all layers."""
        ...

    def attend(
        self, layer: int, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, place_N: Tensor, visible: Visible, /
    ) -> Tensor:
        """[B, H, T, hd]: the queries on what is stored and on the call's own keys and values."""
        ...


@dataclass(frozen=True)
class Read:
    """The hidden states that a call is made for; its last layer computes nothing else but keys and values.

    num_rows   they are in the first R rows of the call; 0 = the call only stores keys and values
    column_RQ  int64: columns of these rows that attend in the last layer; None = all, Q = T
    place_N    int64 into the flattened [R, Q]: the states themselves
    """

    num_rows: int
    column_RQ: Tensor | None
    place_N: Tensor


@dataclass(frozen=True)
class SharedContext:
    """What queries see in the input [clean | noisy_1 .. noisy_K]; masks of `blocks.shared_context_masks`.

    clean_B1SS  the clean stream on itself
    noisy_B1SC  each noisy stream on [clean | itself], C = 2S
    """

    num_streams: int
    clean_B1SS: Tensor
    noisy_B1SC: Tensor


@dataclass(frozen=True)
class Packed:
    """Rows [B, T] without their padding, end to end as the documents of one row [1, N].

    Attention is the only place where tokens meet: there each document gets its row back and sees what it saw before.

    place_N  int64: row * T + column of each token
    visible  what the rows see, as if there were no packing
    """

    batch_size: int
    length: int
    place_N: Tensor
    visible: Tensor | SharedContext | None

    @classmethod
    def of(cls, is_real_BT: Tensor, visible: Tensor | SharedContext | None) -> Packed:
        """The packing of the real positions."""
        batch_size, length = is_real_BT.shape
        return cls(batch_size, length, is_real_BT.flatten().nonzero()[:, 0], visible)

    def pack(self, rows_BTx: Tensor) -> Tensor:
        """[1, N, ...]: the real positions of [B, T, ...]."""
        return rows_BTx.flatten(0, 1)[self.place_N][None]

    def unpack(self, packed_1Nx: Tensor) -> Tensor:
        """[B, T, ...]: every position in its row again; 0 at padding."""
        rest = packed_1Nx.shape[2:]
        zeros = torch.zeros((self.batch_size * self.length, *rest), dtype=packed_1Nx.dtype, device=packed_1Nx.device)
        return zeros.index_copy(0, self.place_N, packed_1Nx[0]).view(self.batch_size, self.length, *rest)


# A mask, broadcastable to [B, 1, T, K]; None = everything. Or the structure of several streams, or of documents.
Visible = Tensor | SharedContext | Packed | None


def _rows(visible: Visible, start: int, stop: int) -> Visible:
    return visible[start:stop] if isinstance(visible, Tensor) and len(visible) > 1 else visible


def attend(query_BHTd: Tensor, key_BHKd: Tensor, value_BHKd: Tensor, visible: Visible) -> Tensor:
    """Scaled dot-product attention [B, H, T, hd]; grouped key/value heads are repeated as needed."""
    if isinstance(visible, Packed):
        return _attend_documents(query_BHTd, key_BHKd, value_BHKd, visible)
    if isinstance(visible, SharedContext):
        return _attend_shared(query_BHTd, key_BHKd, value_BHKd, visible)
    is_grouped = query_BHTd.shape[1] != key_BHKd.shape[1]
    return functional.scaled_dot_product_attention(
        query_BHTd, key_BHKd, value_BHKd, attn_mask=visible, enable_gqa=is_grouped
    )


def _attend_shared(query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, shared: SharedContext) -> Tensor:
    """Each noisy stream as a row of its own that reads the clean keys, so no query meets another stream's keys."""
    num_streams, length = shared.num_streams, shared.clean_B1SS.shape[-1]

    def clean(value_BHTd: Tensor) -> Tensor:
        return value_BHTd[:, :, :length]

    def streams(value_BHTd: Tensor) -> Tensor:
        batch, heads, _, size = value_BHTd.shape
        split = value_BHTd[:, :, length:].reshape(batch, heads, num_streams, length, size)
        return split.transpose(1, 2).flatten(0, 1)

    def both(value_BHTd: Tensor) -> Tensor:
        return torch.cat([clean(value_BHTd).repeat_interleave(num_streams, 0), streams(value_BHTd)], dim=2)

    clean_BHSd = attend(clean(query_BHTd), clean(key_BHTd), clean(value_BHTd), shared.clean_B1SS)
    visible_N1SC = shared.noisy_B1SC.repeat_interleave(num_streams, 0)
    noisy_NHSd = attend(streams(query_BHTd), both(key_BHTd), both(value_BHTd), visible_N1SC)
    noisy_BKHSd = noisy_NHSd.reshape(len(query_BHTd), num_streams, *noisy_NHSd.shape[1:])
    return torch.cat([clean_BHSd, noisy_BKHSd.transpose(1, 2).flatten(2, 3)], dim=2)


def _attend_documents(query_1HNd: Tensor, key_1HNd: Tensor, value_1HNd: Tensor, packed: Packed) -> Tensor:
    """Each document as a row of its own, so no query meets another document's keys."""

    def rows(part_1HNd: Tensor) -> Tensor:
        return packed.unpack(part_1HNd.transpose(1, 2)).transpose(1, 2)

    seen_BHTd = attend(rows(query_1HNd), rows(key_1HNd), rows(value_1HNd), packed.visible)
    return packed.pack(seen_BHTd.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class AttentionCall:
    """What the attention of every layer shares in one forward.

    A layer asks `queries` which of its inputs attend, and `outputs` which of them go on: all of them, except in the
    last layer of a forward that is read at some positions only (see `reading`).
    """

    turn: Rotation
    visible: Visible
    cache: Cache | None
    place_N: Tensor | None  # where the cache holds the tokens
    read: Read | None = None
    query_turn: Rotation | None = None

    @classmethod
    def begin(cls, position_BT: Tensor, turn: Rotation, visible: Visible, cache: Cache | None) -> AttentionCall:
        """The call of tokens whose positions are also their slots of the cache."""
        return cls(turn, visible, cache, None if cache is None else cache.places(position_BT))

    def reading(self, read: Read | None) -> AttentionCall:
        """The call of the last layer."""
        if read is None:
            return self
        num_rows, column_RQ = read.num_rows, read.column_RQ
        cos, sin = self.turn.cos[:num_rows], self.turn.sin[:num_rows]
        visible = _rows(self.visible, 0, num_rows)
        if column_RQ is not None:
            cos, sin = (angle.take_along_dim(column_RQ[:, :, None, None], 1) for angle in (cos, sin))
            if isinstance(visible, Tensor) and visible.shape[2] > 1:
                visible = visible.take_along_dim(column_RQ[:, None, :, None], 2)
        return replace(self, visible=visible, read=read, query_turn=Rotation(cos, sin))

    def queries(self, x_BT: Tensor) -> Tensor:
        """[R, Q, ...]: the part of [B, T, ...] that attends."""
        if self.read is None:
            return x_BT
        first = x_BT[: self.read.num_rows]
        if self.read.column_RQ is None:
            return first
        row_R1 = torch.arange(len(first), device=first.device)[:, None]
        return first[row_R1, self.read.column_RQ]

    def outputs(self, x_BTD: Tensor) -> Tensor:
        """[1, N, D]: the part of [B, T, D] that is read; everything where there is nothing to choose."""
        return x_BTD if self.read is None else self.queries(x_BTD).flatten(0, 1)[self.read.place_N][None]


def rotary_attention(
    query_RQHd: Tensor, key_BTHd: Tensor, value_BTHd: Tensor, layer: int, call: AttentionCall
) -> Tensor:
    """Rotate queries and keys, store keys and values if there is a cache, attend.

    [B, T, H * hd]; where only some positions are read [1, N, H * hd], from the queries that `call.queries` names.
    """
    query = rotate(query_RQHd, call.turn if call.query_turn is None else call.query_turn).transpose(1, 2)
    key, value = rotate(key_BTHd, call.turn).transpose(1, 2), value_BTHd.transpose(1, 2)
    if call.cache is not None and call.place_N is not None:
        mixed = call.cache.attend(layer, query, key, value, call.place_N, call.visible)
    else:
        mixed = attend(query, key[: len(query)], value[: len(query)], call.visible)
    mixed_RQD = mixed.transpose(1, 2).flatten(2)
    return mixed_RQD if call.read is None else mixed_RQD.flatten(0, 1)[call.read.place_N][None]
