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


def per_token_power_mean(
    logp_RS: Tensor, is_target_RS: Tensor, length_R: Tensor, sample_R: Tensor, num_samples: int, power: float
) -> Tensor:
    """float64 [B]: (1 / power) mean over k of log(mean over views of p(k)^power 1[k scored] / ratio), nats per token.

    ratio is the share of the `length_R` scored tokens of the sample that the view scores; k runs over the tokens that
    some view scores. SPG's upper bound without its constant (Wang et al. 2025). Evaluated around the largest log-prob
    of each token, so no power underflows.
    """
    scaled_RS = logp_RS.double() * power
    num_targets_R1 = is_target_RS.sum(-1, keepdim=True).clamp(min=1)
    log_weight_RS = (length_R[:, None].double() / num_targets_R1).log().expand_as(scaled_RS)
    term_RS = torch.where(is_target_RS, scaled_RS + log_weight_RS, -torch.inf)
    shape = (num_samples, scaled_RS.shape[1])
    lowest_BS = torch.full(shape, -torch.inf, dtype=term_RS.dtype, device=term_RS.device)
    highest_BS = lowest_BS.scatter_reduce(0, sample_R[:, None].expand_as(term_RS), term_RS.detach(), "amax")
    is_covered_BS = highest_BS > -torch.inf
    shift_RS = torch.where(is_target_RS, highest_BS[sample_R], 0.0)
    share_RS = torch.where(is_target_RS, (term_RS - shift_RS).exp(), 0.0)
    sum_BS = torch.zeros_like(highest_BS).index_add(0, sample_R, share_RS)
    num_views_B1 = torch.bincount(sample_R, minlength=num_samples).clamp(min=1)[:, None]
    log_mean_BS = torch.where(is_covered_BS, sum_BS, 1.0).log() - num_views_B1.double().log()
    value_BS = torch.where(is_covered_BS, log_mean_BS + highest_BS.where(is_covered_BS, 0.0), 0.0)
    return value_BS.sum(-1) / is_covered_BS.sum(-1).clamp(min=1) / power
