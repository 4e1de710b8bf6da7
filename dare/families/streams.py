"""Block models: the noisy streams of one sample's views share one clean stream.

Clean keys never depend on the noise, so [clean | noisy_1 .. noisy_K] scores K views in (K + 1) S tokens instead of the
2 K S of K two-stream passes, with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamPack:
    """How R views become G rows of one clean and K noisy streams.

    num_streams  K, the most views that a sample has here; samples with fewer leave streams unused
    first_G      int64: a view of each sample, whose context is the clean stream
    slot_R       int64: the stream of each view among the G x K
    """

    num_streams: int
    first_G: Tensor
    slot_R: Tensor

    def ids(self, noisy_RS: Tensor, context_RS: Tensor) -> Tensor:
        """int64 [G, (K + 1) S]: the input; unused streams hold the clean ids."""
        clean_GS = context_RS[self.first_G]
        streams_NS = clean_GS.repeat_interleave(self.num_streams, 0)
        streams_NS[self.slot_R] = noisy_RS
        return torch.cat([clean_GS, streams_NS.view(len(clean_GS), -1)], dim=1)

    def in_noisy_streams(self, is_real_RS: Tensor) -> Tensor:
        """bool [G, (K + 1) S]: which positions of the input are real ones of a noisy stream that is used."""
        clean_GS = torch.zeros_like(is_real_RS[self.first_G])
        streams_NS = clean_GS.repeat_interleave(self.num_streams, 0)
        streams_NS[self.slot_R] = is_real_RS
        return torch.cat([clean_GS, streams_NS.view(len(clean_GS), -1)], dim=1)

    def views_of(self, hidden_GTD: Tensor) -> Tensor:
        """[R, S, D]: the hidden states of each view's noisy stream."""
        num_samples, width, size = hidden_GTD.shape
        length = width // (self.num_streams + 1)
        streams_NSD = hidden_GTD[:, length:].reshape(num_samples * self.num_streams, length, size)
        return streams_NSD[self.slot_R]


def pack_streams(sample_R: Tensor, context_RS: Tensor) -> StreamPack | None:
    """The packing of these views, or None where it saves no tokens or views of a sample differ in their context."""
    _, group_R = torch.unique(sample_R, return_inverse=True)
    count_G = torch.bincount(group_R)
    num_streams = int(count_G.max()) if len(count_G) else 0
    if len(count_G) * (num_streams + 1) >= 2 * len(sample_R):
        return None
    order_R = group_R.argsort(stable=True)
    start_G = count_G.cumsum(0) - count_G
    first_G = order_R[start_G]
    if not torch.equal(context_RS, context_RS[first_G][group_R]):
        return None
    rank_R = torch.empty_like(order_R)
    rank_R[order_R] = torch.arange(len(order_R), device=order_R.device) - start_G[group_R[order_R]]
    return StreamPack(num_streams, first_G, group_R * num_streams + rank_R)
