"""Candidates: filtering, exact draws with one uniform number, log-probs and scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dare.core.rng import Key
from dare.diffusion import sampling

GOLDEN = Path(__file__).parents[1] / "golden"
PROBS = [name for name in json.loads((GOLDEN / "sdar" / "decode.json").read_text()) if name.startswith("prim_probs")]


def draws(key: Key, num: int) -> torch.Tensor:
    return key.uniform(torch.arange(num))


@pytest.mark.parametrize("name", PROBS)
def test_filtered_distribution_is_the_published_one(name: str) -> None:
    options = {"temperature": 1.0, "top_k": None, "top_p": None}
    options |= json.loads((GOLDEN / "sdar" / "decode.json").read_text())[name]["kwargs"]
    tensors = load_file(GOLDEN / "sdar" / "decode.safetensors")
    logits_NV, expected_NV = tensors[f"{name}/logits"], tensors[f"{name}/probs"]
    probs_NV = sampling.filtered(logits_NV, **options).softmax(-1)
    torch.testing.assert_close(probs_NV, expected_NV, atol=1e-6, rtol=0)
    assert torch.equal(probs_NV > 0, expected_NV > 0)


def test_greedy_is_the_published_argmax() -> None:
    tensors = load_file(GOLDEN / "llada" / "decode.safetensors")
    logits = tensors["prim_gumbel_t0.0/logits"].flatten(0, 1)
    token_N = sampling.sample(logits, 0.0, None, None, torch.zeros(len(logits)))
    assert torch.equal(token_N, tensors["prim_gumbel_t0.0/argmax"].flatten())


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def kept(top_k: int | None, top_p: float | None) -> list[int]:
        return sampling.filtered(logits, 1.0, top_k, top_p)[0].isfinite().nonzero()[:, 0].tolist()

    assert kept(None, 0.4) == [0]
    assert kept(None, 0.6) == [0, 1, 2]  # the token that crosses, and the one that ties with it
    assert kept(None, 0.95) == [0, 1, 2, 3]
    assert kept(1, None) == [0]
    assert kept(2, None) == [0, 1, 2]
    assert kept(99, None) == [0, 1, 2, 3]
    # 0.5 is 0.56 of what top-k 3 leaves, so that 0.53 is crossed at once; of the whole it would not be.
    assert kept(3, 0.53) == [0]
    assert kept(None, 0.53) == [0, 1, 2]
    # A lower temperature sharpens before top-p.
    assert sampling.filtered(logits, 0.1, None, 0.9)[0].isfinite().tolist() == [True, False, False, False]


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=40).filter(any),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53, 1 - 2.0**-25])),
)
def test_draw_is_the_inverse_of_the_distribution_function(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights])
    token = int(sampling.categorical(probs, torch.tensor([uniform], dtype=torch.float64)))
    assert weights[token] > 0
    total, before = sum(weights), sum(weights[:token])
    assert before - 1e-5 * total <= uniform * total <= before + weights[token] + 1e-5 * total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Pearson's chi-square with 6 degrees of freedom; 22.46 is exceeded once in a thousand keys."""
    num = 200_000
    logits = torch.tensor([0.3, -1.0, 1.7, 0.0, -3.0, 2.0, 0.9, 5.0])
    logits = sampling.without(logits[None], [7])
    uniform_N = draws(Key(0).fold("chi-square"), num)
    token_N = sampling.sample(logits.expand(num, -1), temperature, None, None, uniform_N)
    expected_V = (logits[0].double() / temperature).softmax(-1) * num
    count_V = torch.bincount(token_N, minlength=8)
    assert count_V[7] == 0
    chi_square = ((count_V - expected_V)[:7] ** 2 / expected_V[:7]).sum()
    assert chi_square < 22.46


def test_draws_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    sampling.sample(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), 1.0, 5, 0.9, draws(Key(1), 8))
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31), top_k=st.one_of(st.none(), st.integers(1, 12)), top_p=st.sampled_from([None, 0.3, 0.9])
)
def test_a_row_does_not_depend_on_its_mates_nor_choose_what_is_forbidden(
    seed: int, top_k: int | None, top_p: float | None
) -> None:
    key = Key(seed)
    logits_NV = 6 * key.fold("logits").uniform(torch.arange(5)[:, None], torch.arange(11)).float()
    logits_NV[:, 3] += 20.0
    allowed_NV = sampling.without(logits_NV, [3, 8])
    token_N = sampling.sample(allowed_NV, 0.7, top_k, top_p, draws(key, 5))
    assert not torch.isin(token_N, torch.tensor([3, 8])).any()
    for row in range(5):
        alone = sampling.sample(allowed_NV[row : row + 1], 0.7, top_k, top_p, draws(key, 5)[row : row + 1])
        assert int(alone) == int(token_N[row])


def test_logp_and_scores_are_those_of_the_whole_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(6, 9, generator=generator)
    logits_NV[0, 8] = 9.0  # the mask token is the most probable one
    logits_NV[1, 4] = -math.inf
    token_N = torch.randint(0, 4, (6,), generator=generator)
    probs_NV = logits_NV.double().softmax(-1)
    own_N = probs_NV.gather(1, token_N[:, None])[:, 0]
    top_N2 = probs_NV[:, :8].topk(2).values
    entropy_N = torch.special.entr(probs_NV).sum(-1)
    expected = {
        "confidence": own_N,
        "max_prob": top_N2[:, 0],
        "margin": top_N2[:, 0] - top_N2[:, 1],
        "negative_entropy": -entropy_N,
    }
    for name, value_N in expected.items():
        found_N = sampling.score(name, logits_NV, token_N, mask_id=8)
        torch.testing.assert_close(found_N.double(), value_N, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sampling.token_logp(logits_NV, token_N).double(), own_N.log(), atol=1e-5, rtol=0)
    sharp_N = (logits_NV.double() / 0.5).log_softmax(-1).gather(1, token_N[:, None])[:, 0]
    torch.testing.assert_close(sampling.token_logp(logits_NV, token_N, 0.5).double(), sharp_N, atol=1e-5, rtol=0)


def test_equal_logits_give_the_first_token() -> None:
    assert int(sampling.sample(torch.zeros(1, 5), 0.0, None, None, torch.zeros(1))) == 0


def test_nothing_to_leave_out_costs_nothing() -> None:
    logits = torch.zeros(2, 3)
    assert sampling.without(logits, ()) is logits
    assert torch.equal(sampling.without(logits, (1,)), torch.tensor([[0.0, -math.inf, 0.0]] * 2))
    assert not logits.any()


# --- large vocabularies


@pytest.mark.parametrize("vocab_size", [32, 96, 768, 1000, 4097])
def test_a_draw_in_two_levels_inverts_the_distribution_function(vocab_size: int) -> None:
    """Against float64 sums: the token whose interval holds the number, wherever rounding leaves no doubt."""
    generator = torch.Generator().manual_seed(vocab_size)
    probs_NV = torch.rand(300, vocab_size, generator=generator) ** 8
    probs_NV[:, ::3] = 0.0
    probs_NV[0, 5:] = 0.0
    uniform_N = torch.rand(300, generator=generator, dtype=torch.float64)
    uniform_N[:3] = torch.tensor([0.999999999999, 0.0, 1.0 - 2**-53])
    token_N = sampling.categorical(probs_NV, uniform_N)
    assert (probs_NV.gather(-1, token_N[:, None]) > 0).all()
    cdf_NV = probs_NV.double().cumsum(-1) / probs_NV.double().sum(-1, keepdim=True)
    exact_N = (cdf_NV > uniform_N[:, None]).int().argmax(-1)
    is_clear_N = (cdf_NV - uniform_N[:, None]).abs().amin(-1) > 1e-6
    assert is_clear_N.sum() > 200
    assert torch.equal(token_N[is_clear_N], exact_N[is_clear_N])


def test_draws_in_two_levels_follow_the_distribution() -> None:
    """chi-square over 400,000 draws; 99.9 % quantile for 63 degrees of freedom: 103.4."""
    probs_V = torch.rand(64, generator=torch.Generator().manual_seed(3)) ** 2
    uniform_N = Key(5).uniform(torch.arange(400_000))
    count_V = torch.bincount(sampling.categorical(probs_V.expand(400_000, -1), uniform_N), minlength=64)
    expected_V = 400_000 * probs_V.double() / probs_V.double().sum()
    assert float(((count_V - expected_V) ** 2 / expected_V).sum()) < 103.4


@pytest.mark.parametrize("forbidden", [(), (7,), (7, 0, 511)])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 2.5])
def test_a_draw_is_a_sample_and_its_log_prob(temperature: float, forbidden: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = 6 * torch.randn(64, 512, generator=generator)
    logits_NV[:, 7] += 12  # what is forbidden has most of the mass
    uniform_N = torch.rand(64, generator=generator, dtype=torch.float64)
    before_NV = logits_NV.clone()
    token_N, logp_N = sampling.draw(logits_NV, temperature, forbidden, uniform_N)
    assert torch.equal(logits_NV, before_NV)
    allowed_NV = sampling.without(before_NV, forbidden)
    assert torch.equal(token_N, sampling.sample(allowed_NV, temperature, None, None, uniform_N))
    expected_N = sampling.token_logp(before_NV.double(), token_N, temperature or 1.0)
    torch.testing.assert_close(logp_N.double(), expected_N, rtol=1e-6, atol=1e-5)


def test_a_forbidden_token_may_have_all_the_mass() -> None:
    logits_NV = torch.zeros(2, 256)
    logits_NV[:, 9] = 300.0
    for temperature in (0.0, 1.0):
        token_N, logp_N = sampling.draw(logits_NV, temperature, (9,), torch.tensor([0.3, 0.9]).double())
        assert 9 not in token_N.tolist()
        assert logp_N.tolist() == [-300.0, -300.0]


@settings(max_examples=40, deadline=None)
@given(vocab_size=st.sampled_from([5, 64, 100, 512]), seed=st.integers(0, 99))
def test_the_first_of_equal_maxima_is_taken(vocab_size: int, seed: int) -> None:
    logits_NV = torch.randint(0, 3, (4, vocab_size), generator=torch.Generator().manual_seed(seed)).float()
    expected = [row.index(max(row)) for row in logits_NV.tolist()]
    assert sampling.most_likely(logits_NV).tolist() == expected
