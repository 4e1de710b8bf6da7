"""Likelihoods of continuations: no batch size, common masks, exact where one token is asked for, guidance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.evals.likelihood import Likelihood, Request, log_likelihood, log_likelihoods
from dare.families.base import Family
from tests.conftest import tiny_family

KEY = Key(3)
REQUESTS = [
    Request([1, 2, 3], [4, 5, 6, 7, 8], 1),
    Request([1, 2, 3], [9], 2),
    Request([5], [4, 4], 3),
    Request([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13], 4),
    Request([2], [3], 5),
]


@pytest.fixture(params=["llada", "sdar", "dream", "llada2"], scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return tiny_family(request.param)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_batch_is_no_part_of_the_estimator(family: Family, batch_size: int) -> None:
    expected = [log_likelihoods(family, [item], Likelihood(num_samples=6), KEY)[0] for item in REQUESTS]
    options = Likelihood(num_samples=6, batch_size=batch_size)
    assert log_likelihoods(family, REQUESTS, options, KEY) == pytest.approx(expected, abs=2e-5)
    backwards = log_likelihoods(family, REQUESTS[::-1], options, KEY)
    assert backwards[::-1] == pytest.approx(expected, abs=2e-5)


def test_one_token_is_exact(family: Family) -> None:
    """Its probabilities sum to one, the mask token's included, and no draw changes them."""
    spec = family.spec
    tokens = [token for token in range(spec.vocab_size) if token != spec.mask_id]
    requests = [Request([1, 2, 3], [token], token) for token in tokens]
    first, second = (
        log_likelihoods(family, requests, Likelihood(num_samples=n), key) for n, key in ((1, KEY), (9, Key(8)))
    )
    assert first == pytest.approx(second, abs=1e-6)
    assert 0.5 < sum(map(math.exp, first)) < 1.0


def test_choices_of_one_document_share_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    family, seen = tiny_family("llada"), []
    original = Family.view_logp

    def watch(self: Family, views: object, canvas: object) -> torch.Tensor:
        seen.append(views.is_target_RS.clone())  # type: ignore[attr-defined]
        return original(self, views, canvas)  # type: ignore[arg-type]

    monkeypatch.setattr(Family, "view_logp", watch)
    options = Likelihood(num_samples=8)
    for completion, sample_id in (([4, 5, 6], 1), ([7, 8, 9], 1), ([7, 8, 9], 2)):
        log_likelihoods(family, [Request([1, 2], completion, sample_id)], options, KEY)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_seeds_differ_and_agree_with_the_single_call(family: Family) -> None:
    request = REQUESTS[0]
    values = {log_likelihoods(family, [request], Likelihood(num_samples=2), Key(seed))[0] for seed in range(4)}
    assert len(values) > 1
    assert log_likelihood(family, [1, 2], [3], 1, KEY) == pytest.approx(
        log_likelihood(family, [1, 2], [3], 5, KEY), abs=1e-6
    )


def test_guidance_against_enumeration() -> None:
    """A completion of two tokens has three masks: the guided ELBO by hand, with whole-vocabulary logits."""
    family, scale, context, completion = tiny_family("llada"), 1.5, [1, 2, 3], [4, 5]
    mask = family.spec.mask_id

    def guided(canvas: list[int]) -> torch.Tensor:
        both = torch.tensor([canvas, [mask] * len(context) + canvas[len(context) :]])
        conditional, unconditional = family.logits(both)
        return (unconditional + (1 + scale) * (conditional - unconditional)).log_softmax(-1)

    with torch.no_grad():
        expected = 0.0
        for masked in ([0], [1], [0, 1]):
            canvas = context + [mask if i in masked else token for i, token in enumerate(completion)]
            logp = sum(float(guided(canvas)[len(context) + i, completion[i]]) for i in masked)
            # l = 1 or 2 with probability 1/2 each, weight 2 / l; a set of one token has probability 1/2.
            expected += 0.5 * logp * 2 / len(masked) * (0.5 if len(masked) == 1 else 1.0)
    options = Likelihood(num_samples=4000, cfg_scale=scale, batch_size=500)
    estimate = log_likelihoods(family, [Request(context, completion, 1)], options, KEY)[0]
    assert estimate == pytest.approx(expected, abs=0.02)
    plain = log_likelihoods(family, [Request(context, completion, 1)], Likelihood(num_samples=4), KEY)
    nearly = log_likelihoods(family, [Request(context, completion, 1)], Likelihood(num_samples=4, cfg_scale=1e-9), KEY)
    assert nearly == pytest.approx(plain, abs=1e-5)


def test_mistakes_are_named(family: Family) -> None:
    options = Likelihood(num_samples=1)
    with pytest.raises(DareError, match="empty"):
        log_likelihoods(family, [Request([1], [], 1)], options, KEY)
    with pytest.raises(DareError, match="mask token"):
        log_likelihoods(family, [Request([1], [family.spec.mask_id], 1)], options, KEY)
    with pytest.raises(DareError, match="longer than the model"):
        log_likelihoods(family, [Request([1] * 99, [2], 1)], options, KEY)
    if family.spec.attention != "full":
        with pytest.raises(DareError, match="guidance"):
            log_likelihoods(family, [Request([1], [2], 1)], Likelihood(cfg_scale=1.0), KEY)


def test_progress_is_reported() -> None:
    calls: list[tuple[int, int]] = []
    log_likelihoods(
        tiny_family("llada"), REQUESTS, Likelihood(num_samples=2, batch_size=2), KEY, lambda *a: calls.append(a)
    )
    assert calls[-1] == (5, 5)
    assert all(before < after for (before, _), (after, _) in itertools.pairwise(calls))
