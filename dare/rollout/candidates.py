"""From hidden states at masked (or editable) positions to candidates, one chunk of logits at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dare.diffusion import sampling
from dare.diffusion.unmask import RankingName, find_policy
from dare.families.base import Family
from dare.families.layers.head import chunk_rows
from dare.rollout.meter import Meter
from dare.rollout.plan import Plan


class Candidates(NamedTuple):
    """What N masked positions propose; where a rollout may edit, also positions that hold a token.

    logp_N   float32, nats: log-prob of the token under the network's own softmax at the sampling temperature,
             before guidance, forbidden tokens, top-k and top-p: what a trainer scores
    score_N  float32: what the unmask policy ranks by; 0 where that does not depend on the network
    confidence_N  float32: what decides on an edit; 0 in a rollout that does not
    prob_N, top_NA, top_prob_NA  see `dare.core.predictions.Predictions`; A is 0 and prob_N zeros unless asked for
    """

    token_N: Tensor
    logp_N: Tensor
    score_N: Tensor
    confidence_N: Tensor
    prob_N: Tensor
    top_NA: Tensor
    top_prob_NA: Tensor


def propose(
    family: Family,
    plan: Plan,
    plain_ND: Tensor,
    unconditional_ND: Tensor | None,
    uniform_N: Tensor,
    meter: Meter,
    num_alternatives: int = 0,
) -> Candidates:
    """A candidate for each masked position, drawn with its own uniform number."""
    rows = chunk_rows(family.spec.vocab_size)
    parts = []
    for start in range(0, len(plain_ND), rows):
        part = slice(start, start + rows)
        meter.switch("head")
        logits_NV = family.row_logits(plain_ND[part])
        unconditional_NV = None if unconditional_ND is None else family.row_logits(unconditional_ND[part])
        meter.switch("sampling")
        found = _propose_chunk(plan, family.spec.mask_id, logits_NV, unconditional_NV, uniform_N[part])
        if num_alternatives:
            found = _with_alternatives(plan, found, _guided(plan, logits_NV, unconditional_NV), num_alternatives)
        parts.append(found)
    meter.num_logit_rows += len(plain_ND)
    meter.switch("bookkeeping")
    return Candidates(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _propose_chunk(
    plan: Plan, mask_id: int, logits_NV: Tensor, unconditional_NV: Tensor | None, uniform_N: Tensor
) -> Candidates:
    decode, score = plan.decode, find_policy(plan.decode.unmask).score
    if unconditional_NV is None and plan.is_plain_draw:
        token_N, logp_N = sampling.draw(logits_NV, decode.temperature, plan.forbidden_ids, uniform_N)
        if score == "confidence" and plan.logp_temperature == 1.0 and decode.edit_threshold is None:
            return _candidates(token_N, logp_N, logp_N.exp(), torch.zeros_like(logp_N))
        return _scored(plan, score, logits_NV, token_N, logp_N, mask_id)
    guided_NV = _guided(plan, logits_NV, unconditional_NV)
    allowed_NV = sampling.without(guided_NV, plan.forbidden_ids)
    token_N = sampling.sample(allowed_NV, decode.temperature, decode.top_k, decode.top_p, uniform_N)
    logp_N = sampling.token_logp(logits_NV, token_N, plan.logp_temperature)
    ranked_NV = sampling.without(guided_NV, plan.unranked_ids)
    if "sampled_scores" in decode.compat:
        ranked_NV = sampling.filtered(ranked_NV, decode.temperature or 1.0, decode.top_k, decode.top_p)
    return _scored(plan, score, ranked_NV, token_N, logp_N, mask_id)


def _guided(plan: Plan, logits_NV: Tensor, unconditional_NV: Tensor | None) -> Tensor:
    if unconditional_NV is None:
        return logits_NV
    return unconditional_NV + (1.0 + plan.decode.cfg_scale) * (logits_NV - unconditional_NV)


def _scored(
    plan: Plan, score: RankingName, ranked_NV: Tensor, token_N: Tensor, logp_N: Tensor, mask_id: int
) -> Candidates:
    score_N = confidence_N = torch.zeros_like(logp_N)
    if score != "uniform" and score != "none":
        score_N = sampling.score(score, ranked_NV, token_N, mask_id)
    if plan.decode.edit_threshold is not None:
        confidence_N = sampling.score("confidence", ranked_NV, token_N, mask_id)
    return _candidates(token_N, logp_N, score_N, confidence_N)


def _candidates(token_N: Tensor, logp_N: Tensor, score_N: Tensor, confidence_N: Tensor) -> Candidates:
    """Candidates without alternatives."""
    nothing = (torch.zeros_like(logp_N), token_N[:, None][:, :0], logp_N[:, None][:, :0])
    return Candidates(token_N, logp_N, score_N, confidence_N, *nothing)


def _with_alternatives(plan: Plan, found: Candidates, guided_NV: Tensor, num: int) -> Candidates:
    top_NA, top_prob_NA = sampling.most_probable(guided_NV, plan.forbidden_ids, num)
    prob_N = sampling.token_logp(guided_NV, found.token_N).exp()
    return found._replace(prob_N=prob_N, top_NA=top_NA, top_prob_NA=top_prob_NA)
