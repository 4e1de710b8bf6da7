"""Activation checkpointing: what a layer's backward needs is kept, or computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

# What "selective" keeps: the results of matrix products and of attention, which are most of the work.
_KEPT_NAMES = (
    "mm",
    "addmm",
    "bmm",
    "_grouped_mm",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def run_layer(
    layer: Callable[..., Tensor], x_BTD: Tensor, index: int, call: Any, recompute: Recompute = "none"
) -> Tensor:
    """`layer(x_BTD, index, call)`; the same bits, forward and backward, whatever is recomputed.

    "none"       everything that the backward needs is kept
    "selective"  kept are matrix products and attention; norms, rotations and activations are computed again
    "full"       kept is the layer's input; its forward runs twice
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return layer(x_BTD, index, call)
    # Nothing here is random, so there is no generator state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_KEPT)  # type: ignore[no-untyped-call]
    result: Tensor = checkpoint(layer, x_BTD, index, call, **options)
    return result


def _kept_operators() -> list[Any]:
    """Those of `_KEPT_NAMES` that this torch has."""
    return [getattr(torch.ops.aten, name).default for name in _KEPT_NAMES if hasattr(torch.ops.aten, name)]


_KEPT = _kept_operators()
