"""Entropy of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """[...]: the entropy of softmax(logits) over the last axis, nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)
