"""Log-probs of views -> log-likelihoods of tokens, views and sequences, in nats and never divided.

A plan (`corrupt.py`) gives each scored log-prob a weight such that the weighted sum over all views of a sample is its
estimate of that sample's log-likelihood; these are the three ways of summing. All sums run in float64: a sequence is
hundreds of nats and a ratio of policies lives in its last digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def per_token(logp_RS: Tensor, weight_RS: Tensor, sample_R: Tensor, num_samples: int) -> Tensor:
    """float64 [B, S]: the weighted sum over the views of each sample, by position."""
    weighted_RS = logp_RS.double() * weight_RS.double()
    zero_BS = torch.zeros((num_samples, weighted_RS.shape[1]), dtype=weighted_RS.dtype, device=weighted_RS.device)
    return zero_BS.index_add(0, sample_R, weighted_RS)


def per_view(logp_RS: Tensor, weight_RS: Tensor) -> Tensor:
    """float64 [R]: the weighted sum over the positions of each view."""
    return (logp_RS.double() * weight_RS.double()).sum(-1)


def per_sequence(logp_RS: Tensor, weight_RS: Tensor, sample_R: Tensor, num_samples: int) -> Tensor:
    """float64 [B]: the weighted sum over the views and positions of each sample."""
    view_R = per_view(logp_RS, weight_RS)
    return torch.zeros(num_samples, dtype=view_R.dtype, device=view_R.device).index_add(0, sample_R, view_R)
