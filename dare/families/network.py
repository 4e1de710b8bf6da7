"""What every transformer here computes: hidden states, and the head's weight.

Shapes: B rows, T queries of one call, K keys, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from dare.families.layers.attention import Cache, Read, Visible
from dare.families.layers.recompute import Recompute


class Network(nn.Module, ABC):
    """The native transformer of a family; its state dict has the names and shapes of the official checkpoint."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    logit_scale: float
    recompute: Recompute = "none"  # what the backward of a layer computes again instead of keeping it

    @abstractmethod
    def forward(
        self,
        ids_BT: Tensor,
        position_BT: Tensor,
        visible: Visible,
        cache: Cache | None = None,
        read: Read | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm; with `read` those it names, [1, N, D].

        position_BT  rotary position of each token
        visible      bool, broadcastable to [B, 1, T, K]; None = everything is visible. K = T without a cache or with a
                     fresh one, else the slots that are read. Or the masks of several noisy streams, for `attend`
        cache        keys and values of this call are written at slot = position before attention reads them;
                     a slot that is overwritten later simply holds the later value
        read         spares the last layer all other work; layers ask their `AttentionCall`
        """

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers in order: the units in which weights are sharded over processes, activations computed again."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[V, D]; raw logits are `hidden @ head_weight.T * logit_scale`."""

    @abstractmethod
    def is_residual_output(self, name: str) -> bool:
        """Whether the parameter `name` writes into the residual stream; a new model starts with smaller ones."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        """A change of dtype reaches parameters only: a rounded routing bias would choose other experts."""
        buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in buffers:
            converted = module._buffers[name]
            if converted is not None and converted.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(converted.device)
        return self
