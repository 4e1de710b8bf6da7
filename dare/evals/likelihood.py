"""Monte-Carlo likelihood of a completion: exact mask counts, stratified over all draws, keyed by content."""

from __future__ import annotations

import torch

from dare.core.errors import DareError
from dare.core.rng import Key, stable_id
from dare.core.types import Samples
from dare.diffusion import corrupt
from dare.families.base import Family

_VIEWS_PER_FORWARD = 32  # compute only: never part of the estimator


def log_likelihood(family: Family, context: list[int], completion: list[int], num_samples: int, key: Key) -> float:
    """The ELBO of `completion` given `context`, nats.

    Each draw masks exactly l tokens, l uniform on {1..L} and stratified over the draws, weight L / l. Unlike the
    public LLaDA evaluation the batch size is no part of the estimator (there it sets the strata). A completion of
    one token is exact with one draw. Block models: the same per block, all blocks of a draw in one forward.
    Raises DareError for an empty completion or one that holds the mask token.
    """
    if not completion:
        raise DareError("the completion is empty, so it has no likelihood", fix="give at least one token")
    if family.spec.mask_id in completion:
        raise DareError("the completion holds the mask token, which has no likelihood", fix="give real tokens only")
    if num_samples < 1:
        raise DareError("num_samples must be at least 1", got=num_samples)
    num_draws = 1 if len(completion) == 1 else num_samples
    canvas = family.canvas([context], [completion])
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.tensor([stable_id("likelihood", *context, "->", *completion)]),
        advantage_B=torch.zeros(1),
        group_B=torch.zeros(1, dtype=torch.int64),
        mask_id=family.spec.mask_id,
    )
    views = corrupt.exact_count(samples, key, num_views=num_draws)
    total = 0.0
    with torch.no_grad():
        for part in torch.split(torch.arange(num_draws), _VIEWS_PER_FORWARD):
            chosen = views.rows(part)
            logp_RS = family.view_logp(chosen, canvas.rows(chosen.sample_R))
            total += float((logp_RS.cpu().double() * chosen.weight_RS).sum())
    return total
