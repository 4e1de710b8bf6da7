"""Attention over an optional cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dare.families.layers.rope import Rotation, rotate


class KVCache:
    """Rotated keys and values of one batch, written in place: per layer two tensors [B, Hkv, S, hd].

    Slot = position. Which slots a query may see is the caller's `visible` mask, so a noisy block can be
    written and later overwritten by its clean version.
    """

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
        shape = (batch_size, num_kv_heads, length, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def write(self, layer: int, key_BHTd: Tensor, value_BHTd: Tensor, slot_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values at `slot_BT` (int64 [B, T]) and return all slots of the layer."""
        index = slot_BT[:, None, :, None].expand_as(key_BHTd)
        self.keys[layer].scatter_(2, index, key_BHTd)
        self.values[layer].scatter_(2, index, value_BHTd)
        return self.keys[layer], self.values[layer]

    def rows(self, row_B: Tensor) -> KVCache:
        """A copy with the chosen rows."""
        chosen = object.__new__(KVCache)
        chosen.keys = [key[row_B] for key in self.keys]
        chosen.values = [value[row_B] for value in self.values]
        return chosen


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
    """What the attention of every layer shares in one forward; `position_BT` are also the slots of the cache."""

    position_BT: Tensor
    turn: Rotation
    visible: Visible
    cache: KVCache | None


def rotary_attention(
    query_BTHd: Tensor, key_BTHd: Tensor, value_BTHd: Tensor, layer: int, call: AttentionCall
) -> Tensor:
    """[B, T, H * hd]: rotate queries and keys, store keys and values if there is a cache, attend."""
    query = rotate(query_BTHd.transpose(1, 2), call.turn)
    key = rotate(key_BTHd.transpose(1, 2), call.turn)
    value = value_BTHd.transpose(1, 2)
    if call.cache is not None:
        key, value = call.cache.write(layer, key, value, call.position_BT)
    return attend(query, key, value, call.visible).transpose(1, 2).flatten(2)
