"""Losses by noise level: how well a model fills in few masks, and many."""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.types import Metric, Samples, Views
from dare.diffusion.corrupt import unit_of
from dare.objectives import reduce

NUM_BUCKETS = 5


def bucket_name(bucket: int) -> str:
    """`nll_at/0-20`: mean negative log-prob of the masked tokens where up to 20 % of a unit are masked."""
    width = 100 // NUM_BUCKETS
    return f"nll_at/{bucket * width}-{(bucket + 1) * width}"


def nll_by_noise(logp_RS: Tensor, views: Views, samples: Samples) -> dict[str, Metric]:
    """Nats per masked token, by the share of scored tokens that are masked; buckets without a token are left out.

    The share is counted in what is masked together: the completion, or for block models each block. Unlike the loss,
    whose weight 1 / t makes single steps jump, these are plain means, and the ones to watch.
    """
    is_scored_RS = samples.is_scored_BS[views.sample_R]
    is_target_RS = views.is_target_RS & is_scored_RS
    unit_RS = unit_of(samples)[views.sample_R]
    zero_RU = torch.zeros(len(unit_RS), int(unit_RS.max()) + 1)
    masked_RU = zero_RU.scatter_add(1, unit_RS, is_target_RS.float())
    share_RU = reduce.divide(masked_RU, zero_RU.scatter_add(1, unit_RS, is_scored_RS.float()))
    bucket_RS = (share_RU.gather(1, unit_RS) * NUM_BUCKETS).ceil().long().clamp(min=1) - 1
    found = {}
    for bucket in range(NUM_BUCKETS):
        metric = reduce.metric(-logp_RS, is_target_RS & (bucket_RS == bucket))
        if metric.count:
            found[bucket_name(bucket)] = metric
    return found
