"""Supervised objectives: which are bounds, what their settings change, and that nothing depends on the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dare.algorithms.sft import SFT, SFTOptions
from dare.algorithms.sft_presets import PRESETS
from dare.algorithms.trace_sft import TraceSFT, TraceSFTOptions
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, likelihood, supervised
from dare.diffusion.schedule import SCHEDULES, find_schedule
from dare.diffusion.supervised import Noise
from tests.numerics import toy

ELBO = {None: -4.4783095268, 1: -4.4863565160, 2: -4.4430287095, 4: -4.4783095268}
VOCAB = 4  # the toy's three tokens and its mask


def sft(**options: Any) -> SFT:
    return SFT(SFTOptions.model_validate(options), vocab_size=VOCAB)


def logp_of(views: Views, samples: Samples) -> Tensor:
    return toy.view_logp(views, samples.canvas)


def ragged(rows: tuple[int, ...] = (0, 1, 2, 3), *, block_length: int | None = 2, num_padding: int = 0) -> Samples:
    completions = [[0, 2, 1, 0, 1], [1, 1], [2, 0, 0, 1, 2, 2, 1], [0, 0, 1]]
    return dataclasses.replace(
        toy.make_samples(
            [completions[row] for row in rows],
            prompts=[[2] * (1 + row) for row in rows],
            sample_ids=list(rows),
            block_length=block_length,
            num_padding=num_padding,
        ),
        eos_ids=(1,),
    )


# 1. Bounds


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_expected_loss_is_minus_the_elbo_per_token(schedule: str) -> None:
    """By exact enumeration of all masks and Gauss-Legendre quadrature over t: every schedule bounds the same number."""
    one = toy.make_samples()
    noise, algorithm = find_schedule(schedule), sft(schedule=schedule)
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(400))
    # t = s^4 spreads the nodes towards 0, where the square root changes fast.
    s = (nodes + 1) / 2
    t, share = s.pow(4), weights / 2 * 4 * s.pow(3)
    total = torch.zeros((), dtype=torch.float64)
    for size in range(1, 5):
        sets = toy.subsets(4, size)
        is_masked = toy.masks_of(sets, one)
        views = corrupt.assemble(one, is_masked, is_masked, torch.ones(is_masked.shape))
        nll = -likelihood.per_view(logp_of(views, one), views.weight_RS)
        p = noise.mask_probability(t)
        chance = (share * noise.loss_weight(t) * p.pow(size) * (1 - p).pow(4 - size)).sum()
        total = total + chance * nll.sum() / 4
    assert float(total) == pytest.approx(-ELBO[None] / 4, rel=1e-6)
    assert algorithm.objective.noise.schedule == schedule


@pytest.mark.parametrize("block_length", [None, 1, 2, 4])
@pytest.mark.parametrize(
    "settings_of",
    [
        {"preset": "llada"},
        {"preset": "sdar"},
        {"preset": "bd3lm"},
        {"time_spread": "none", "views_per_sample": 2},
        {"views_per_sample": 4, "is_complementary": True},
        {"schedule": "square", "time_spread": "blocks", "views_per_sample": 2},
        {"is_eos_unit": True, "norm": "batch"},
        {"num_masked": "exact", "schedule": "cosine"},
        {"num_masked": "exact", "preset": "bd3lm"},
    ],
    ids=str,
)
def test_bounds_are_unbiased(settings_of: dict[str, Any], block_length: int | None) -> None:
    """The mean loss of many draws, within four standard errors; the trailing EOS of one token is a unit of one."""
    num = 3000
    samples = dataclasses.replace(
        toy.make_samples([toy.COMPLETION] * num, block_length=block_length), eos_ids=(toy.COMPLETION[-1],)
    )
    algorithm = sft(t_min=1e-4, **settings_of)
    views = algorithm.corrupt(samples, Key(1))
    logp_RS = logp_of(views, samples)
    value_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, num)
    loss = float(algorithm.loss(logp_RS, logp_RS, None, views, samples).value)
    scale = 1.0 if algorithm.objective.norm == "batch" else 0.25
    assert loss == pytest.approx(-float(value_B.mean()) * scale)
    assert abs(float(value_B.mean()) - ELBO[block_length]) < 4 * float(value_B.std()) / num**0.5 + 2e-3


def test_times_of_the_blocks_of_a_sample_are_kept_apart_and_uniform() -> None:
    """One of K equal parts of [0, 1) for each block, and each block's own law uniform, whatever its place."""
    samples = toy.make_samples([[0] * 8] * 2000, block_length=2)
    scope = corrupt.scored_scope(samples)
    share_BS = corrupt.time_shares(samples, Key(3), scope, 1, is_time_per_block=True, spread="blocks")[:, 0, 1:9]
    share_BK = share_BS[:, ::2]
    assert torch.equal((share_BK * 4).floor().sort(-1).values, torch.arange(4.0).expand(2000, 4).double())
    for block in range(4):
        assert float(share_BK[:, block].mean()) == pytest.approx(0.5, abs=4 * 0.29 / 2000**0.5)
        histogram = torch.histc(share_BK[:, block], bins=4, min=0, max=1)
        assert float(((histogram - 500) ** 2 / 500).sum()) < 16.3  # chi-square, 3 degrees of freedom, 0.1 %


def test_a_sample_draws_the_same_views_in_any_batch() -> None:
    options: list[dict[str, Any]] = [
        {"preset": "bd3lm"},
        {"preset": "dream", "is_eos_unit": True},
        {"preset": "llada2"},
        {"preset": "llada2_edit", "edit_rate": 0.5},
    ]
    for settings_of in options:
        algorithm, whole = sft(**settings_of), ragged()
        expected = algorithm.corrupt(whole, Key(2))
        for rows, num_padding in (((2,), 0), ((3, 0), 6), ((1, 3, 2, 0), 1)):
            samples = ragged(rows, num_padding=num_padding)
            got = algorithm.corrupt(samples, Key(2))
            for index, row in enumerate(rows):
                own, other = got.rows(got.sample_R == index), expected.rows(expected.sample_R == row)
                length = int(samples.canvas.is_real_BS[index].sum())
                for name in ("noisy_RS", "is_target_RS", "weight_RS"):
                    assert torch.equal(getattr(own, name)[:, :length], getattr(other, name)[:, :length]), name


# 2. Weights and masks


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.floats(0.05, 0.95))
@settings(deadline=None)
def test_context_weights_are_the_sum_over_visible_neighbours(is_visible: list[bool], p: float) -> None:
    got = supervised.context_weight(torch.tensor(is_visible)[None, None], p)[0, 0]
    for i in range(len(is_visible)):
        near = [abs(i - j) for j, seen in enumerate(is_visible) if seen and j != i]
        assert float(got[i]) == pytest.approx(sum(0.5 * p * (1 - p) ** (d - 1) for d in near), abs=1e-12)
    assert float(got.max()) <= 1.0
    mirrored = supervised.context_weight(torch.tensor(is_visible[::-1])[None, None], p)[0, 0]
    torch.testing.assert_close(mirrored.flip(0), got)


def test_context_weights_of_the_published_example() -> None:
    is_visible = torch.tensor([True, False, False, True, False, True])[None, None]
    for p, expected in ((0.1, [0.13145, 0.1355, 0.13645]), (0.8, [0.4832, 0.496, 0.8032])):
        got = supervised.context_weight(is_visible, p)[0, 0][[1, 2, 4]]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_losses_of_one_mask() -> None:
    """The stored example: 1/t over L, the mean over masked tokens, 1 - t, and the double normalisation nobody wants."""
    samples = toy.make_samples()
    uniform = torch.full((1, 1, 5), 0.9, dtype=torch.float64)
    uniform[0, 0, [1, 4]] = 0.1
    t = torch.full((1, 1, 5), 0.4, dtype=torch.float64)
    for options, expected in (
        ({}, 2.2843481069),
        ({"weight": "uniform", "norm": "masked"}, 1.8274784856),
        ({"weight": "one_minus_t", "norm": "masked"}, 1.0964870913),
        ({"norm": "masked"}, 4.5686962139),
    ):
        algorithm = sft(**options)
        views = supervised.masked(samples, algorithm.objective.noise, t, uniform)
        logp_RS = logp_of(views, samples)
        value = algorithm.loss(logp_RS, logp_RS, None, views, samples).value
        assert float(value) == pytest.approx(expected, rel=1e-7)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 0.45]))
@settings(deadline=None, max_examples=30)
def test_complementary_views_cover_every_token_once(seed: int, t_min: float) -> None:
    samples = ragged()
    algorithm = sft(preset="llada2", t_min=t_min)
    views = algorithm.corrupt(samples, Key(seed))
    covered_BS = torch.zeros(samples.canvas.input_BS.shape).index_add(0, views.sample_R, views.is_target_RS.float())
    assert torch.equal(covered_BS.bool(), samples.is_scored_BS)
    assert float(covered_BS.max()) == 1.0
    logp_RS = logp_of(views, samples)
    value = algorithm.loss(logp_RS, logp_RS, None, views, samples).value
    assert float(value) == pytest.approx(-float(logp_RS.sum()) / int(samples.is_scored_BS.sum()), rel=1e-6)


def test_rates_stay_in_their_band() -> None:
    samples = toy.make_samples([[0] * 200] * 200, block_length=None)
    views = sft(preset="llada2", is_complementary=False, views_per_sample=1).corrupt(samples, Key(0))
    rate_R = views.is_target_RS.sum(-1) / 200
    assert 0.15 < float(rate_R.min()) < 0.4
    assert 0.7 < float(rate_R.max()) < 0.95
    assert float(rate_R.mean()) == pytest.approx(0.55, abs=0.05)


@given(st.integers(0, 10_000), st.sampled_from([None, 1, 2, 3]))
@settings(deadline=None, max_examples=30)
def test_exact_counts_mask_the_next_whole_number_of_tokens(seed: int, block_length: int | None) -> None:
    """Of every unit; the weight of a masked token is n / count, so a mask of n / n tokens weighs 1."""
    samples = ragged(block_length=block_length)
    algorithm = sft(num_masked="exact", views_per_sample=2)
    views = algorithm.corrupt(samples, Key(seed))
    unit_BS = corrupt.unit_of(samples)
    for row in range(views.num_views):
        sample = int(views.sample_R[row])
        for unit in unit_BS[sample][samples.is_scored_BS[sample]].unique():
            is_unit_S = samples.is_scored_BS[sample] & (unit_BS[sample] == unit)
            num, count = int(is_unit_S.sum()), int((views.is_target_RS[row] & is_unit_S).sum())
            assert 1 <= count <= num
            weight = views.weight_RS[row][views.is_target_RS[row] & is_unit_S]
            torch.testing.assert_close(weight, torch.full_like(weight, num / count / 2))


def test_exact_counts_have_less_variance() -> None:
    """The same expectation as independent masks (see the bounds above), over completions of thirty tokens."""
    samples = toy.make_samples([[0, 1, 2] * 10] * 400, block_length=None)
    spread = {}
    for name in ("random", "exact"):
        views = sft(num_masked=name).corrupt(samples, Key(0))
        total_R = (views.weight_RS * views.is_target_RS).sum(-1)
        spread[name] = float(total_R.std())
    assert spread["exact"] < 1e-4  # the weights of a view add up to its tokens, whatever its count
    assert spread["random"] > 1.0


def test_rounded_counts_prefer_later_tokens() -> None:
    samples = toy.make_samples([[0] * 20] * 500, block_length=None)
    views = sft(preset="nemo").corrupt(samples, Key(0))
    share_S = views.is_target_RS[:, 1:21].double().mean(0)
    assert float(share_S[15:].mean()) > float(share_S[:5].mean()) + 0.15
    t_R = 1.0 / views.weight_RS.amax(-1)
    num_R = views.is_target_RS.sum(-1)
    has_mask_R = num_R > 0
    torch.testing.assert_close(num_R[has_mask_R].float(), (20 * t_R[has_mask_R]).round())


def test_kept_rates_are_within_their_band_in_every_block() -> None:
    """Blocks of ten tokens; the draws of a sample stay its own, and one token can be nothing but out of the band."""
    samples = toy.make_samples([[0] * 30] * 50 + [[0]], block_length=10)
    views = sft(t_min=0.3, t_max=0.7, is_rate_kept=True).corrupt(samples, Key(1))
    share_RK = views.is_target_RS[:50, 1:31].view(50, 3, 10).double().mean(-1)
    assert float(share_RK.min()) >= 0.3 - 1e-9
    assert float(share_RK.max()) <= 0.7 + 1e-9
    alone = toy.make_samples([[0] * 30], block_length=10, sample_ids=[7])
    own = sft(t_min=0.3, t_max=0.7, is_rate_kept=True).corrupt(alone, Key(1))
    assert torch.equal(own.is_target_RS[0], views.is_target_RS[7])
    free = sft(t_min=0.3, t_max=0.7).corrupt(samples, Key(1))
    assert not torch.equal(free.is_target_RS, views.is_target_RS)


def test_the_trailing_eos_is_one_unit() -> None:
    """All or none of the run, never an EOS inside the answer, and the rest as without the option."""
    samples = dataclasses.replace(toy.make_samples([[0, 1, 2, 1, 1, 1]] * 300), eos_ids=(1,))
    assert supervised.trailing_eos(samples)[0].tolist() == [False] * 4 + [True] * 3
    unit = sft(is_eos_unit=True, t_min=1e-4).corrupt(samples, Key(0)).is_target_RS
    plain = sft(t_min=1e-4).corrupt(samples, Key(0)).is_target_RS
    num_masked = unit[:, 4:].sum(-1)
    assert set(num_masked.tolist()) == {0, 3}
    assert torch.equal(unit[:, :5], plain[:, :5])


# 3. Edits, drafts, confidence, focal


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=40)
def test_edits_replace_only_visible_scored_tokens(seed: int, rate: float) -> None:
    samples = ragged()
    samples.is_scored_BS[2, 3:5] = False
    noise = Noise(weight="uniform", edit_rate=rate, edit_weight=0.5, vocab_size=VOCAB)
    views = supervised.noised(samples, Key(seed), noise)
    clean_RS = samples.canvas.input_BS[views.sample_R]
    is_scored_RS = samples.is_scored_BS[views.sample_R]
    is_mask_RS = views.noisy_RS == samples.mask_id
    is_replaced_RS = (views.noisy_RS != clean_RS) & ~is_mask_RS
    assert not bool((is_replaced_RS & ~is_scored_RS).any())
    assert torch.equal(views.is_target_RS, is_scored_RS)
    assert torch.equal(views.context_RS, clean_RS)
    torch.testing.assert_close(views.weight_RS, is_mask_RS.float() + 0.5 * (is_scored_RS & ~is_mask_RS).float())


def test_edits_happen_at_their_rate_and_tokens_are_uniform() -> None:
    samples = toy.make_samples([[0, 1, 2, 0]] * 2000)
    noise = Noise(t_min=0.2, t_max=0.2, weight="uniform", edit_rate=0.25, vocab_size=VOCAB)
    views = supervised.noised(samples, Key(0), noise)
    is_visible = (views.noisy_RS != toy.MASK)[:, 1:]
    is_replaced = is_visible & (views.noisy_RS[:, 1:] != views.target_RS[:, 1:])
    num = int(is_visible.sum())
    assert abs(float(is_replaced.sum() / num) - 0.25) < 4 * (0.25 * 0.75 / num) ** 0.5
    of_zeros = views.noisy_RS[:, 1:][is_replaced & (views.target_RS[:, 1:] == 0)]
    assert set(of_zeros.tolist()) == {1, 2}
    assert abs(float((of_zeros == 1).float().mean()) - 0.5) < 4 * 0.5 / len(of_zeros) ** 0.5


@given(st.floats(0, 0.999999), st.integers(0, 9), st.integers(0, 9))
def test_another_token(uniform: float, token: int, mask_id: int) -> None:
    got = int(supervised.other_token(torch.tensor(uniform).double(), torch.tensor(token), mask_id, 10))
    assert 0 <= got < 10
    assert token == mask_id or got not in (token, mask_id)


def test_draft_turns_show_the_models_guesses() -> None:
    """Each turn adds one view per view of the last one: its guesses instead of its masks, the same targets."""
    samples = ragged()
    algorithm = sft(preset="llada2_edit", edit_rate=0.0, draft_turns=2, edit_weight=0.5)
    views = algorithm.corrupt(samples, Key(0))
    first = views
    assert algorithm.num_predictions == 2
    guesses = []
    for turn in range(2):
        guess_RS = (views.target_RS + 1 + turn) % 3
        guesses.append(guess_RS)
        views = algorithm.with_predictions(views, samples, guess_RS)
    assert views.num_views == 3 * first.num_views
    assert views.sample_R.tolist() == sorted(views.sample_R.tolist())
    for row in range(4):
        masked, once, twice = (views.rows((views.sample_R == row) & (views.view_R == turn)) for turn in range(3))
        is_target = masked.is_target_RS
        for draft, shift in ((once, 1), (twice, 2)):
            assert torch.equal(draft.is_target_RS, is_target)
            assert torch.equal(draft.noisy_RS, torch.where(is_target, (masked.target_RS + shift) % 3, masked.target_RS))
            assert torch.equal(draft.weight_RS, 0.5 * is_target.float())
    logp_RS = logp_of(views, samples)
    metrics = algorithm.loss(logp_RS, logp_RS, None, views, samples).metrics
    assert metrics["nll_visible"].count == 2 * metrics["nll_masked"].count


def test_confidence_is_the_mean_entropy_where_the_guess_is_right() -> None:
    samples = ragged()
    algorithm = sft(confidence_weight=2.0)
    views = algorithm.corrupt(samples, Key(3))
    assert algorithm.auxiliary(views, samples) is None  # not asked yet
    right = algorithm.with_predictions(views, samples, views.target_RS)
    auxiliary = algorithm.auxiliary(right, samples)
    assert auxiliary is not None
    num = int(views.is_target_RS.sum())
    assert len(auxiliary.view_A) == num
    logits = torch.zeros((num, 5))
    term = auxiliary.term(logits, torch.arange(num))
    assert float(term.sum()) == pytest.approx(2.0 * math.log(5), rel=1e-6)
    wrong = algorithm.with_predictions(views, samples, views.target_RS + 1)
    assert algorithm.auxiliary(wrong, samples) is None


def test_the_focal_factor_makes_the_loss_nonlinear() -> None:
    samples = ragged()
    algorithm = sft(focal_gamma=2.0, focal_alpha=0.25)
    assert not algorithm.is_linear
    views = algorithm.corrupt(samples, Key(3))
    logp_RS = logp_of(views, samples)
    scaled_RS = logp_RS * 0.25 * (1 - logp_RS.exp()) ** 2
    plain = sft()
    expected = plain.loss(scaled_RS, scaled_RS, None, views, samples).value
    torch.testing.assert_close(algorithm.loss(logp_RS, logp_RS, None, views, samples).value, expected)


# 4. Presets and their families

SPEC = FamilySpec("x", "full", "completion", 4, False, 3, (2,), 1, VOCAB, 64, sft_preset="dream")


def test_a_family_decides_what_the_recipe_leaves_open() -> None:
    algorithm = SFT(SFTOptions(norm="token")).adapted(SPEC)
    assert (algorithm.objective.noise.weight, algorithm.objective.norm) == ("cart", "token")
    assert algorithm.options.preset == "dream"
    assert algorithm.objective.noise.vocab_size == VOCAB
    again = SFT(SFTOptions.model_validate(algorithm.options.model_dump(mode="json"))).adapted(SPEC)
    assert again.objective == algorithm.objective
    explicit = SFT(SFTOptions(preset="sdar")).adapted(SPEC)
    assert explicit.objective.noise.time_per == "sample"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_a_whole_objective(preset: str) -> None:
    algorithm = sft(preset=preset)
    assert SFTOptions.problem(algorithm.objective) is None
    decided = algorithm.options.decided("llada")
    assert decided.objective() == algorithm.options.objective()
    samples = ragged()
    views = algorithm.corrupt(samples, Key(0))
    logp_RS = logp_of(views, samples)
    assert float(algorithm.loss(logp_RS, logp_RS, None, views, samples).value) > 0


def test_the_block_length_follows_its_schedule() -> None:
    algorithm = sft(block_schedule=[[0.0, 1], [0.25, 8], [0.9, 4]])
    assert [algorithm.block_length(p) for p in (0.0, 0.24, 0.25, 0.89, 0.9, 0.999)] == [1, 1, 8, 8, 4, 4]
    assert sft().block_length(0.5) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 0.6, "t_max": 0.5}, "above t_max"),
        ({"is_complementary": True, "views_per_sample": 2, "t_min": 0.5}, "t_min below 0.5"),
        ({"cart_p": 1.0}, "less than 1"),
        ({"edit_rate": 1.0}, "less than 1"),
        ({"preset": "lada"}, "'llada'"),
        ({"block_schedule": [[0.1, 4]]}, "rise from 0"),
        ({"block_schedule": [[0.0, 4], [0.0, 8]]}, "rise from 0"),
        ({"block_schedule": [[0.0, 0]]}, "at least one position"),
        ({"focal_gamma": 0.5}, "greater than or equal to 1"),
        ({"draft_turns": 9}, "less than or equal to 4"),
        ({"norm": "constant"}, "norm_length goes with"),
        ({"norm_length": 8}, "norm_length goes with"),
        ({"num_masked": "exact", "preset": "llada2"}, "goes without is_complementary"),
        ({"num_masked": "rounded", "is_eos_unit": True}, "goes without"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SFTOptions.model_validate(options)


def test_settings_that_do_not_fit_the_familys_preset_are_refused() -> None:
    """What is fine for LLaDA may not be for the preset that the family brings."""
    spec = dataclasses.replace(SPEC, sft_preset="llada2")
    with pytest.raises(DareError, match="even views_per_sample") as error:
        SFT(SFTOptions(views_per_sample=1)).adapted(spec)
    assert "preset llada2" in str(error.value)


def test_edits_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="adapted to a family"):
        SFT(SFTOptions(edit_rate=0.1)).corrupt(ragged(), Key(0))


# 5. Trace distillation


def test_trace_distillation_needs_a_length_for_a_constant_norm() -> None:
    with pytest.raises(ValidationError, match="norm_length goes with"):
        TraceSFTOptions(norm="constant")


@pytest.mark.parametrize(("shrink", "expected"), [(1, -5.1106705979), (4, -4.4355513900)])
def test_trace_distillation_learns_verified_rollouts_only(shrink: int, expected: float) -> None:
    """One state per token of the stored trace, or one state for the whole of it; the nll of a token on average."""
    samples = toy.make_samples([toy.COMPLETION] * 3, step_maps=[[1, 0, 2, 1]] * 3)
    algorithm = TraceSFT(TraceSFTOptions(shrink=shrink, min_reward=0.5))
    reward_B = torch.tensor([1.0, 0.4, 0.5])
    samples.advantage_B = algorithm.advantages(reward_B, samples.group_B)
    assert samples.advantage_B.tolist() == [1.0, 0.0, 1.0]
    views = algorithm.corrupt(samples, Key(0))
    logp_RS = logp_of(views, samples).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    assert float(loss.value.detach()) == pytest.approx(-expected / 4, rel=1e-9)
    assert loss.metrics["learnt"].mean == pytest.approx(2 / 3)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    assert not bool((grad_RS[views.sample_R == 1] != 0).any())
    per_state = TraceSFT(TraceSFTOptions(shrink=shrink, min_reward=0.5, norm="constant", norm_length=8))
    value = float(per_state.loss(logp_RS, logp_RS, None, views, samples).value.detach())
    num_states = int((views.sample_R != 1).sum())
    assert value == pytest.approx(-expected * 2 / num_states / 8, rel=1e-9)
    samples.advantage_B.zero_()
    assert float(algorithm.loss(logp_RS, logp_RS, None, views, samples).value.detach()) == 0.0
