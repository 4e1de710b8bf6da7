"""Truncated importance weights of rollouts that other weights, or another engine, made (Yao et al. 2025).

A rollout is a sequence of commits. Its weight is the probability of those commits now over that when they were made.
That needs one scoring pass over the states that the rollout saw, whatever the algorithm scores otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dare.core.engine import Engine
from dare.core.recipe import Correction
from dare.core.types import Samples
from dare.diffusion import corrupt
from dare.objectives import reduce


def log_weights(engine: Engine, samples: Samples, correction: Correction) -> Tensor:
    """float64 [B], nats: log of each rollout's importance weight, summed over its scored tokens or their mean.

    sequence   of the whole trajectory: the importance weight itself
    geometric  its geometric mean per token: far less variance, biased
    Raises DareError for samples that are no rollouts.
    """
    views = corrupt.trace_replay(samples, samples.is_scored_BS, temperature=samples.rollout_temperature)
    if samples.rollout_logp_BS is None:
        raise ValueError("rollouts record their log-probs")
    gap_RS = engine.score(views, samples).double() - samples.rollout_logp_BS[views.sample_R].double()
    gap_R = torch.where(views.is_target_RS, gap_RS, 0.0).sum(-1)
    num_samples = samples.canvas.batch_size
    total_B = torch.zeros(num_samples, dtype=torch.float64).index_add(0, views.sample_R, gap_R)
    if correction == "sequence":
        return total_B
    num_B = torch.zeros(num_samples, dtype=torch.int64).index_add(0, views.sample_R, views.is_target_RS.sum(-1))
    return reduce.divide(total_B, num_B)


def corrected(engine: Engine, samples: Samples, correction: Correction, cap: float) -> tuple[Samples, dict[str, float]]:
    """The samples with their advantages times min(weight, cap), and what the weights were like.

    correction/weight     mean weight after truncation
    correction/truncated  share of the rollouts whose weight was above the cap
    correction/ess        (sum w)^2 / (B sum w^2): the share of the batch that is worth as much, in (0, 1]
    """
    if correction == "none" or not samples.canvas.batch_size:
        return samples, {}
    log_B = log_weights(engine, samples, correction)
    weight_B = log_B.clamp(max=math.log(cap)).exp()
    metrics = {
        "correction/weight": float(reduce.mean(weight_B)),
        "correction/truncated": float(reduce.mean((log_B > math.log(cap)).double())),
        "correction/ess": float(reduce.divide(weight_B.sum() ** 2, len(weight_B) * (weight_B**2).sum())),
    }
    return replace(samples, advantage_B=samples.advantage_B * weight_B.float()), metrics
