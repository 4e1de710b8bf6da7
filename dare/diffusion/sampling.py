"""From logits to candidates: which token a masked position proposes, and how sure the network is of it.

Shapes: N gathered positions, V vocabulary. Everything is row-wise, so a row's result does not depend on its mates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET = 256  # neighbouring tokens that an inverse CDF looks at together
_MIN_BUCKET = 32

ScoreName = Literal["confidence", "max_prob", "margin", "negative_entropy"]


def without(logits_NV: Tensor, ids: Sequence[int]) -> Tensor:
    """The logits with probability 0 for the tokens `ids`; the argument itself if there are none."""
    if not ids:
        return logits_NV
    return logits_NV.index_fill(-1, torch.tensor(ids, device=logits_NV.device), -math.inf)


def filtered(logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits whose softmax is the distribution to sample: divided by the temperature, then top-k, then top-p.

    Removed tokens are at -inf. top-p keeps the most probable tokens up to and including the one whose cumulative
    probability crosses `top_p`, renormalised after top-k (the order of SDAR's sampler). Tokens that tie with the
    last one kept are kept.
    """
    logits_NV = logits_NV / temperature
    if top_k is None and top_p is None:
        return logits_NV
    num_kept = min(top_k or logits_NV.shape[-1], logits_NV.shape[-1])
    sorted_NK = logits_NV.topk(num_kept).values
    if top_p is not None:
        probs_NK = sorted_NK.softmax(-1)
        before_NK = torch.cat([torch.zeros_like(probs_NK[:, :1]), probs_NK.cumsum(-1)[:, :-1]], dim=-1)
        last_N1 = (before_NK <= top_p).sum(-1, keepdim=True) - 1
        lowest_N1 = sorted_NK.gather(-1, last_N1)
    else:
        lowest_N1 = sorted_NK[:, -1:]
    return logits_NV.masked_fill(logits_NV < lowest_N1, -math.inf)


def categorical(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """int64 [N]: one exact draw per row by inverse CDF; a token of probability 0 is never drawn.

    probs_NV   float32, non-negative; need not add up to 1
    uniform_N  one number in [0, 1) per row: no noise over the vocabulary

    In two levels where the vocabulary is large: a bucket of neighbours, then the token in it. Only sums of buckets and
    one bucket are accumulated, instead of the whole vocabulary.
    """
    num_rows, vocab_size = probs_NV.shape
    width = math.gcd(vocab_size, _BUCKET)
    if width < _MIN_BUCKET:
        return _invert(probs_NV, uniform_N)[0]
    probs_NbV = probs_NV.view(num_rows, -1, width)
    bucket_N, share_N = _invert(probs_NbV.sum(-1), uniform_N)
    row_N = torch.arange(num_rows, device=probs_NV.device)
    return bucket_N * width + _invert(probs_NbV[row_N, bucket_N], share_N)[0]


def _invert(probs_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """The cell of each row in which the number falls, and where in the cell, from 0 to 1."""
    is_possible_NV = probs_NV > 0
    # A parallel cumulative sum may wobble by a rounding error, also at impossible tokens: only possible ones count.
    cumulative_NV = probs_NV.cumsum(-1).masked_fill(~is_possible_NV, 0.0)
    total_N = cumulative_NV.amax(-1)
    highest_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    target_N = torch.minimum(uniform_N.double() * total_N, highest_N)
    cell_N = (cumulative_NV > target_N.to(total_N.dtype)[:, None]).int().argmax(-1)
    mass_N, end_N = (values.gather(-1, cell_N[:, None])[:, 0] for values in (probs_NV, cumulative_NV))
    return cell_N, (1.0 - (end_N - target_N) / mass_N).clamp(0.0, 1.0)


def draw(
    logits_NV: Tensor, temperature: float, forbidden_ids: Sequence[int], uniform_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The candidate of each row and its natural log-prob under softmax(logits / temperature), forbidden ones included.

    `sample` and `token_logp` in one go: one softmax and a few maxima. Temperature 0 takes the most probable token, with
    its log-prob at temperature 1. Forbidden logits are scratch and come back as they were.
    """
    scale = 1.0 / (temperature or 1.0)
    index_F = torch.tensor(list(forbidden_ids), dtype=torch.int64, device=logits_NV.device)
    probs_NV = (logits_NV if scale == 1.0 else logits_NV * scale).softmax(-1)
    high_N, peak_N = logits_NV.amax(-1), probs_NV.amax(-1)
    if temperature:
        token_N = categorical(probs_NV.index_fill_(-1, index_F, 0.0), uniform_N)
    else:
        forbidden_NF = logits_NV[:, index_F]
        token_N = most_likely(logits_NV.index_fill_(-1, index_F, -math.inf))
        logits_NV.index_copy_(-1, index_F, forbidden_NF)
    # Not the log of its own probability, which rounds to 0 where a forbidden token takes it all.
    return token_N, (logits_NV.gather(-1, token_N[:, None])[:, 0] - high_N) * scale + peak_N.log()


def most_likely(logits_NV: Tensor) -> Tensor:
    """int64 [N]: the first of each row's largest values.

    Maxima of buckets first: a maximum alone is an order of magnitude cheaper than one with its place.
    """
    num_rows, vocab_size = logits_NV.shape
    width = math.gcd(vocab_size, _BUCKET)
    if width < _MIN_BUCKET:
        return logits_NV.argmax(-1)
    logits_NbV = logits_NV.view(num_rows, -1, width)
    bucket_N = logits_NbV.amax(-1).argmax(-1)
    row_N = torch.arange(num_rows, device=logits_NV.device)
    return bucket_N * width + logits_NbV[row_N, bucket_N].argmax(-1)


def sample(logits_NV: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform_N: Tensor) -> Tensor:
    """int64 [N]: the candidate of each row; temperature 0 takes the most probable token (the first among equals)."""
    if temperature == 0.0:
        return most_likely(logits_NV)
    return categorical(filtered(logits_NV, temperature, top_k, top_p).softmax(-1), uniform_N)


def token_logp(logits_NV: Tensor, token_N: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 [N]: natural log-prob of `token_N` under softmax(logits / temperature) over the whole vocabulary."""
    logits_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
    return logits_NV.gather(-1, token_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def most_probable(logits_NV: Tensor, forbidden_ids: Sequence[int], num: int) -> tuple[Tensor, Tensor]:
    """int64 and float32 [N, A]: the `num` most probable tokens that may be produced, and their probabilities.

    Probabilities are those of the whole distribution at temperature 1, forbidden tokens in the normaliser. A is smaller
    than `num` only if the vocabulary is.
    """
    allowed_NV = without(logits_NV, forbidden_ids)
    num_allowed = logits_NV.shape[-1] - len(set(forbidden_ids))
    top = allowed_NV.topk(min(num, num_allowed))
    return top.indices, (top.values - logits_NV.logsumexp(-1, keepdim=True)).exp()


def score(name: ScoreName, logits_NV: Tensor, token_N: Tensor, mask_id: int) -> Tensor:
    """float32 [N]: what an unmask policy ranks positions by; the highest is committed first.

    All scores are taken at temperature 1, before top-k and top-p, and the mask token counts in the normaliser.

    "confidence"        probability of the candidate: depends on the sampled token
    "max_prob"          probability of the most probable token, the mask token aside
    "margin"            difference of the two highest probabilities, the mask token aside
    "negative_entropy"  minus the entropy of the whole distribution, nats
    """
    return _SCORES[name](logits_NV, token_N, mask_id)


def _confidence(logits_NV: Tensor, token_N: Tensor, mask_id: int) -> Tensor:
    return token_logp(logits_NV, token_N).exp()


def _max_prob(logits_NV: Tensor, token_N: Tensor, mask_id: int) -> Tensor:
    return (without(logits_NV, [mask_id]).amax(-1) - logits_NV.logsumexp(-1)).exp()


def _margin(logits_NV: Tensor, token_N: Tensor, mask_id: int) -> Tensor:
    top_N2 = without(logits_NV, [mask_id]).topk(2).values
    first_N, second_N = (top_N2 - logits_NV.logsumexp(-1, keepdim=True)).exp().unbind(-1)
    return first_N - second_N


def _negative_entropy(logits_NV: Tensor, token_N: Tensor, mask_id: int) -> Tensor:
    entropy_N: Tensor = torch.special.entr(logits_NV.softmax(-1)).sum(-1)
    return -entropy_N


_SCORES: dict[ScoreName, Callable[[Tensor, Tensor, int], Tensor]] = {
    "confidence": _confidence,
    "max_prob": _max_prob,
    "margin": _margin,
    "negative_entropy": _negative_entropy,
}
