"""Properties of the algorithms beyond the first five: golden numbers of the toy network, bounds, laws, identities."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.algorithms.agrpo import AGRPO, AGRPOOptions
from dare.algorithms.bgpo import BGPO, BGPOOptions
from dare.algorithms.cj_grpo import CJGRPO, CJGRPOOptions
from dare.algorithms.ebpo import EBPO, EBPOOptions
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.gdpo import GDPO, GDPOOptions
from dare.algorithms.justgrpo import JustGRPO, JustGRPOOptions
from dare.algorithms.spg import SPG, SPGOptions
from dare.algorithms.tracerl import TraceRL, TraceRLOptions
from dare.algorithms.unigrpo import UniGRPO, UniGRPOOptions
from dare.algorithms.wd1 import WD1, WD1Options
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, likelihood, plans
from dare.diffusion import trace as traces
from dare.families.base import Family
from dare.objectives.advantage import compute_advantages, group_softmax
from dare.objectives.surrogate import linear_surrogate
from dare.rollout.engine import denoise
from tests.numerics import toy

floats = st.floats(-3.0, 3.0, allow_nan=False)


def close(got: Tensor | float, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64).detach(),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=atol,
    )


# --- quadrature (GDPO) ---


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8])
def test_gauss_legendre_nodes(num_nodes: int) -> None:
    node, weight = plans.gauss_legendre(num_nodes)
    expected_node, expected_weight = np.polynomial.legendre.leggauss(num_nodes)
    close(node, (expected_node + 1) / 2, atol=1e-13)
    close(weight, expected_weight / 2, atol=1e-13)
    close(weight.sum(), 1.0, atol=1e-13)
    for power in range(2 * num_nodes):
        close((weight * node**power).sum(), 1 / (power + 1), atol=1e-12)


@pytest.mark.parametrize(("num_nodes", "expected"), [(1, -4.4281260228), (2, -4.4783095268), (3, -4.4783095268)])
def test_quadrature_is_exact_for_short_completions(num_nodes: int, expected: float) -> None:
    """Every mask that a node can draw, with its probability: the ELBO as soon as L <= 2 N."""
    samples = toy.make_samples()
    total = 0.0
    for node, weight in zip(*(value.tolist() for value in plans.gauss_legendre(num_nodes)), strict=True):
        for size in range(1, 5):
            is_masked = toy.masks_of(toy.subsets(4, size), samples)
            views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
            share = node**size * (1 - node) ** (4 - size)
            total += weight / node * share * float(toy.view_logp(views, samples.canvas).sum())
    close(total, expected)


def test_quadrature_masks_with_the_probability_of_its_node() -> None:
    samples = toy.make_samples([[0] * 10] * 500)
    views = plans.quadrature(samples, Key(1), num_nodes=3, scope=corrupt.scored_scope(samples))
    node, weight = plans.gauss_legendre(3)
    is_masked_BMS = views.is_target_RS.view(500, 3, -1)[..., 1:]
    rate_M = is_masked_BMS.double().mean((0, 2))
    assert bool(((rate_M - node).abs() < 4 * (node * (1 - node) / 5000).sqrt()).all())
    close(views.weight_RS.view(500, 3, -1).amax((0, 2)), weight / node, atol=1e-6)


def test_constant_log_probs_give_their_number_times_their_value() -> None:
    """Expected weight per token is sum_n w_n = 1, whatever N."""
    for num_nodes in (1, 2, 3):
        samples = toy.make_samples([[0] * 6] * 2000)
        algorithm = GDPO(GDPOOptions(num_nodes=num_nodes))
        views = algorithm.corrupt(samples, Key(0))
        value_B = likelihood.per_sequence(-0.5 * views.is_target_RS.double(), views.weight_RS, views.sample_R, 2000)
        assert abs(float(value_B.mean()) + 3.0) < 4 * float(value_B.std()) / math.sqrt(2000)


# --- left to right (JustGRPO) ---


@pytest.mark.parametrize("block_length", [None, 1, 2, 3])
def test_left_to_right_likelihoods_sum_to_one(block_length: int | None) -> None:
    samples = toy.make_samples(toy.ALL_COMPLETIONS, block_length=block_length)
    views = plans.left_to_right(samples, samples.is_scored_BS)
    assert views.num_views == 81 * (block_length or 4)
    logp_RS = toy.view_logp(views, samples.canvas)
    total_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, 81)
    close(total_B.exp().sum(), 1.0, atol=1e-12)
    if block_length is None:
        close(total_B[toy.ALL_COMPLETIONS.index(toy.COMPLETION)], -4.6015131779)


def test_left_to_right_masks_all_that_follows() -> None:
    samples = toy.make_samples([[0, 1, 2, 0]], block_length=2)
    views = plans.left_to_right(samples, samples.is_scored_BS)
    assert views.noisy_RS[:, 1:].tolist() == [[3, 3, 3, 3], [0, 3, 2, 3]]
    assert views.is_target_RS[:, 1:].tolist() == [[True, False, True, False], [False, True, False, True]]


@pytest.mark.parametrize(("variant", "expected"), [("clean", -(2 - 1) / 3), ("faithful", -(1.0 - 1.0) / 2)])
def test_what_justgrpo_divides_by(variant: str, expected: float) -> None:
    samples = toy.make_samples([[0, 1, 2, 0], [1, 1, 1, 1]], scored_lengths=[2, 1], advantages=[1.0, -1.0])
    algorithm = JustGRPO(JustGRPOOptions.model_validate({"variant": variant}))
    views = algorithm.corrupt(samples, Key(0))
    logp_RS = toy.view_logp(views, samples.canvas)
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    close(loss.value, expected, atol=1e-9)
    samples.advantage_B[1] = 0.0
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    close(loss.value, -2 / 3 if variant == "clean" else -1 / (1 + 1e-5), atol=1e-9)


# --- traces (TraceRL, AGRPO) ---


def test_shrinking_joins_consecutive_steps() -> None:
    """[3,1,2,2,5,9,9] by two is [5,2,2,2,5,9,9]; by one nothing; by many one view of everything."""
    samples = toy.make_samples([[0] * 7], step_maps=[[3, 1, 2, 2, 5, 9, 9]])

    def steps(shrink: int) -> list[int]:
        views = corrupt.trace_replay(samples, samples.is_scored_BS, shrink=shrink)
        return (views.view_R[:, None] * views.is_target_RS).sum(0)[1:].tolist()

    assert steps(2) == [1, 0, 0, 0, 1, 2, 2]
    assert steps(1) == [2, 0, 1, 1, 3, 4, 4]
    assert steps(9) == [0] * 7
    blocks = toy.make_samples([[0] * 6], step_maps=[[0, 1, 2, 5, 4, 3]], block_length=3)
    views = corrupt.trace_replay(blocks, blocks.is_scored_BS, shrink=3)
    assert views.num_views == 1
    assert bool((views.noisy_RS[0, 1:] == toy.MASK).all())


def test_shrunk_trace_of_the_toy() -> None:
    samples = toy.make_samples(step_maps=[[1, 0, 2, 1]])
    algorithm = TraceRL(TraceRLOptions(shrink=3))
    views = algorithm.corrupt(samples, Key(0))
    close(toy.view_logp(views, samples.canvas).sum(), -4.4355513900)  # one step: all masked
    views = TraceRL(TraceRLOptions()).corrupt(samples, Key(0))
    close(toy.view_logp(views, samples.canvas).sum(), -5.1106705979)


@pytest.mark.parametrize("num_views", [1, 2, 3, 5, 7])
def test_each_view_is_kept_with_the_same_probability(num_views: int) -> None:
    """num / T, over many samples; the weights say so."""
    samples = toy.make_samples([[0] * 5] * 3000)
    whole = plans.left_to_right(samples, samples.is_scored_BS)
    kept = plans.sample_views(whole, samples, Key(2), num=num_views)
    rate = min(num_views, 5) / 5
    assert kept.num_views == 3000 * min(num_views, 5)
    assert set(torch.bincount(kept.sample_R).tolist()) == {min(num_views, 5)}
    share_V = torch.bincount(kept.view_R, minlength=5) / 3000
    assert bool(((share_V - rate).abs() <= 4 * math.sqrt(rate * (1 - rate) / 3000)).all())
    close(kept.weight_RS.max(), max(1 / rate, 1.0), atol=1e-6)


def test_sampled_steps_estimate_the_whole_trace() -> None:
    """Over an even grid of starts AGRPO's mean loss is CJ-GRPO's clean loss, off policy too."""
    samples = toy.make_samples(
        [[0, 1, 2, 0, 1], [2, 1, 1]], step_maps=[[0, 3, 1, 2, 4], [0, 1, 1]], advantages=[1.0, -0.5]
    )
    full = CJGRPO(CJGRPOOptions(beta=0.0, eps=0.2))
    views = full.corrupt(samples, Key(0))
    expected = full.loss(
        toy.view_logp(views, samples.canvas), toy.view_logp(views, samples.canvas, toy.OLD), None, views, samples
    ).value
    algorithm = AGRPO(AGRPOOptions(num_steps=2))
    values = []
    for seed in range(400):
        chosen = algorithm.corrupt(samples, Key(seed))
        new_RS, old_RS = (toy.view_logp(chosen, samples.canvas, theta) for theta in (toy.NEW, toy.OLD))
        values.append(float(algorithm.loss(new_RS, old_RS, None, chosen, samples).value))
    deviation = float(np.std(values)) / math.sqrt(len(values))
    assert deviation > 0
    assert abs(np.mean(values) - float(expected)) < 4 * deviation


def test_the_kl_of_tracerl_goes_where_it_is_told() -> None:
    samples = toy.make_samples(step_maps=[[1, 0, 2, 1]], advantages=[0.0])
    to_old = TraceRL(TraceRLOptions(beta=0.5))
    to_reference = TraceRL(TraceRLOptions(beta=0.5, kl_to="reference"))
    assert not to_old.needs_reference
    assert to_reference.needs_reference
    views = to_old.corrupt(samples, Key(0))
    new_RS, old_RS, reference_RS = (
        toy.view_logp(views, samples.canvas, theta) for theta in (toy.NEW, toy.OLD, toy.REFERENCE)
    )

    def k3(base_RS: Tensor) -> float:
        difference = (new_RS - base_RS)[views.is_target_RS]
        return 0.5 * float((torch.exp(-difference) + difference - 1).mean())

    close(to_old.loss(new_RS, old_RS, None, views, samples).value, k3(old_RS))
    close(to_reference.loss(new_RS, old_RS, reference_RS, views, samples).value, k3(reference_RS))


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("plugin", [(CJGRPO, CJGRPOOptions), (TraceRL, TraceRLOptions), (AGRPO, AGRPOOptions)])
def test_recorded_log_probs_are_the_old_policys(families: dict[str, Family], plugin: Any, family_name: str) -> None:
    """An exact rollout at its own temperature: no scoring pass for the old policy, and the same loss."""
    family = families[family_name]
    decode = Decode(gen_length=8, block_length=4, temperature=0.8, unmask="max_prob", steps_per_block=2)
    trace = denoise(family, [[1, 2], [3, 4, 5]], decode, Key(0), [0, 1])
    samples = Samples(
        canvas=trace.canvas,
        is_scored_BS=traces.scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.tensor([1.0, -1.0]),
        group_B=torch.zeros(2, dtype=torch.int64),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
        rollout_temperature=trace.temperature,
    )
    kind, options = plugin
    scored, recorded = kind(options(beta=0.0)), kind(options(beta=0.0, old="rollout"))
    assert scored.needs_old
    assert not recorded.needs_old
    views = recorded.corrupt(samples, Key(1))
    with torch.no_grad():
        old_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    new_RS = (old_RS + 0.1 * views.is_target_RS).requires_grad_()
    expected = scored.loss(new_RS, old_RS, None, views, samples)
    got = recorded.loss(new_RS, torch.zeros_like(old_RS), None, views, samples)
    torch.testing.assert_close(got.value, expected.value, rtol=1e-4, atol=1e-5)
    recorded.check_rollouts(decode)
    samples.rollout_logp_BS = None
    with pytest.raises(DareError, match="not those"):
        recorded.loss(new_RS, old_RS, None, views, samples)


@pytest.mark.parametrize(
    ("algorithm", "decode", "where"),
    [
        (TraceRL(TraceRLOptions(old="rollout", shrink=2)), {}, "shrink"),
        (TraceRL(TraceRLOptions(rollout_cap=2.0, shrink=2)), {}, "shrink"),
        (AGRPO(AGRPOOptions(old="rollout")), {"cache": "dual"}, "decode.cache"),
        (CJGRPO(CJGRPOOptions(old="rollout")), {"cfg_scale": 1.0}, "cfg_scale"),
        (CJGRPO(CJGRPOOptions(old="rollout", score_temperature="one")), {}, "score_temperature"),
    ],
)
def test_recorded_log_probs_are_refused_where_they_differ(algorithm: Any, decode: Any, where: str) -> None:
    with pytest.raises(DareError) as caught:
        algorithm.check_rollouts(Decode(**decode))
    assert where in str(caught.value)
    options = algorithm.options.model_copy(update={"old": "scored", "rollout_cap": None})
    assert type(algorithm)(options).check_rollouts(Decode(**decode)) == []


@pytest.mark.parametrize("plugin", [(CJGRPO, CJGRPOOptions), (TraceRL, TraceRLOptions), (AGRPO, AGRPOOptions)])
def test_the_rollout_correction_is_a_truncated_weight(plugin: Any) -> None:
    kind, options = plugin
    samples = toy.make_samples(step_maps=[[1, 0, 2, 1]], advantages=[1.0])
    plain, corrected = kind(options(beta=0.0)), kind(options(beta=0.0, rollout_cap=2.0))
    views = plain.corrupt(samples, Key(0))
    old_RS = toy.view_logp(views, samples.canvas)
    recorded_BS = torch.zeros(samples.canvas.input_BS.shape).index_add(0, views.sample_R, old_RS.float())
    expected = plain.loss(old_RS, old_RS, None, views, samples).value
    for gap, weight in ((0.0, 1.0), (-0.3, math.exp(-0.3)), (5.0, 2.0)):
        samples.rollout_logp_BS = recorded_BS - gap * samples.is_scored_BS
        got = corrected.loss(old_RS, old_RS, None, views, samples)
        close(got.value, float(expected) * weight, atol=1e-6)
    samples.rollout_logp_BS = None
    with pytest.raises(DareError, match="rollout's log-probs"):
        corrected.loss(old_RS, old_RS, None, views, samples)


def test_justgrpo_wants_left_to_right_rollouts() -> None:
    algorithm = JustGRPO(JustGRPOOptions())
    assert algorithm.check_rollouts(Decode(unmask="left_to_right")) == []
    assert "left-to-right" in algorithm.check_rollouts(Decode(unmask="max_prob"))[0]
    assert algorithm.check_rollouts(Decode(unmask="left_to_right", block_length=4, steps_per_block=2))


# --- Monte-Carlo draws of a sequence (BGPO, EBPO, GDPO) ---


def two_draws(advantage: float) -> tuple[Samples, Views]:
    """The golden draws {0, 2} and {1, 2, 3} with weights 2 and 4 / 3, halved for two views."""
    samples = toy.make_samples(advantages=[advantage])
    is_masked = toy.masks_of([{0, 2}, {1, 2, 3}], samples)
    weight = torch.tensor([2.0, 4 / 3])[None, :, None].expand(is_masked.shape) / 2
    return samples, corrupt.assemble(samples, is_masked, is_masked, weight)


@pytest.mark.parametrize(
    ("algorithm", "advantage", "expected"),
    [
        (BGPO(BGPOOptions(num_mc=2)), 1.0, -0.9911309136),
        (BGPO(BGPOOptions(num_mc=2)), -1.0, 0.9911763282),
        (GDPO(GDPOOptions(num_nodes=2)), 1.0, -0.9911701279),
        (EBPO(EBPOOptions(num_mc=2)), 1.0, -0.9651455639),
        (EBPO(EBPOOptions(num_mc=2, ratio_norm="length")), 1.0, -0.9911701279),
    ],
)
def test_golden_sequence_ratios(algorithm: Any, advantage: float, expected: float) -> None:
    samples, views = two_draws(advantage)
    new_RS, old_RS = (toy.view_logp(views, samples.canvas, theta) for theta in (toy.NEW, toy.OLD))
    close(algorithm.loss(new_RS, old_RS, None, views, samples).value, expected, atol=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(
    "algorithm", [BGPO(BGPOOptions(num_mc=2)), GDPO(GDPOOptions()), EBPO(EBPOOptions(ratio_norm="length"))]
)
def test_golden_gradient_on_policy(algorithm: Any, advantage: float) -> None:
    """d(mean d) / d theta, the same for both branches of the bound and for the ratio itself."""
    samples, views = two_draws(advantage)
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    new_RS = toy.view_logp(views, samples.canvas, theta)
    loss = algorithm.loss(new_RS, new_RS.detach(), None, views, samples)
    close(torch.autograd.grad(loss.value, theta)[0], 0.0933780445 * advantage, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(st.lists(floats, min_size=1, max_size=8), st.sampled_from([1.0, -1.0, 0.5]))
def test_the_linear_surrogate_is_a_lower_bound(values: list[float], advantage: float) -> None:
    log_ratio = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    objective, _ = linear_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.999999, 1e9)
    exact = log_ratio.detach().mean().exp() * advantage
    assert float(objective.detach().mean()) <= float(exact) + 1e-12
    zero = torch.zeros(len(values), dtype=torch.float64, requires_grad=True)
    objective, is_clipped = linear_surrogate(zero, torch.tensor(advantage, dtype=torch.float64), 0.2, 0.2)
    assert not bool(is_clipped.any())
    close(objective.mean(), advantage)
    close(torch.autograd.grad(objective.mean(), zero)[0], [advantage / len(values)] * len(values))


def test_the_linear_surrogate_is_finite_far_off_policy() -> None:
    log_ratio = torch.tensor([-1.0, -1.5, -50.0, 800.0], dtype=torch.float64, requires_grad=True)
    for advantage in (1.0, -1.0):
        objective, _ = linear_surrogate(log_ratio, torch.full((4,), advantage, dtype=torch.float64), 0.2, 0.2, 3.0)
        (grad,) = torch.autograd.grad(objective.sum(), log_ratio)
        assert bool(objective.isfinite().all())
        assert bool(grad.isfinite().all())
    objective, is_clipped = linear_surrogate(log_ratio.detach(), torch.ones(4), 0.2, 0.3)
    close(objective, [0.0, -0.5, -49.0, 1.3])
    assert is_clipped.tolist() == [False, False, False, True]
    objective, is_clipped = linear_surrogate(log_ratio.detach(), -torch.ones(4), 0.2, 0.3, 3.0)
    close(objective, [-0.8, -0.8, -0.8, -3.0])
    assert is_clipped.tolist() == [True, True, True, True]


def test_what_bgpo_divides_by() -> None:
    """clean: the sample's scored tokens; faithful: on masked models the whole completion, on block models the same."""
    for block_length, scale in ((None, 4 / 2), (2, 1.0)):
        samples = toy.make_samples([[0, 1, 2, 0]], scored_lengths=[2], advantages=[1.0], block_length=block_length)
        grads = []
        views = BGPO(BGPOOptions(num_mc=3)).corrupt(samples, Key(0))
        for variant in ("clean", "faithful"):
            algorithm = BGPO(BGPOOptions.model_validate({"num_mc": 3, "variant": variant}))
            logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
            loss = algorithm.loss(logp_RS, logp_RS.detach(), None, views, samples)
            grads.append(torch.autograd.grad(loss.value, logp_RS)[0])
        close(grads[0], grads[1] * scale, atol=1e-12)


def test_token_norm_weighs_samples_by_length() -> None:
    samples = toy.make_samples([[0, 1, 2, 0], [1]], advantages=[1.0, -0.5])
    for norm, expected in (("sequence", -(1 - 0.5) / 2), ("token", -(4 - 0.5) / 5)):
        algorithm = BGPO(BGPOOptions.model_validate({"num_mc": 2, "norm": norm}))
        views = algorithm.corrupt(samples, Key(0))
        logp_RS = toy.view_logp(views, samples.canvas)
        close(algorithm.loss(logp_RS, logp_RS, None, views, samples).value, expected)


def test_sequence_algorithms_share_their_gradient_on_policy() -> None:
    """Same views, advantages and normaliser: BGPO, EBPO per token and ESPO differ off policy only."""
    samples = toy.make_samples(toy.ALL_COMPLETIONS[:4], advantages=[1.0, -0.5, 0.25, -1.0])
    views = EBPO(EBPOOptions(num_mc=3)).corrupt(samples, Key(0))
    grads = []
    for algorithm in (BGPO(BGPOOptions(num_mc=3)), EBPO(EBPOOptions(ratio_norm="length")), ESPO(ESPOOptions(beta=0.0))):
        logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
        loss = algorithm.loss(logp_RS, logp_RS.detach(), None, views, samples)
        grads.append(torch.autograd.grad(loss.value, logp_RS)[0])
    close(grads[0], grads[1], atol=1e-14)
    close(grads[0], grads[2], atol=1e-14)


# --- wd1 ---


def test_wd1_weights() -> None:
    advantage_B = compute_advantages("mean", torch.tensor([1, 0, 0, 1, 1, 0.5]), torch.zeros(6, dtype=torch.int64))
    group_B = torch.zeros(6, dtype=torch.int64)
    weight_B = group_softmax(advantage_B, group_B) - group_softmax(-advantage_B, group_B)
    close(weight_B, [0.13113889, -0.18480935, -0.18480935, 0.13113889, 0.13113889, -0.02379799], atol=1e-7)
    close(weight_B.sum(), 0.0, atol=1e-12)


def wd1_gradient(algorithm: WD1, samples: Samples) -> Tensor:
    views = algorithm.corrupt(samples, Key(0))
    logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    if not bool((samples.advantage_B != 0).any()) and algorithm.options.terms == "both":
        assert float(loss.value.detach()) == 0.0
    return torch.autograd.grad(loss.value, logp_RS)[0]


def test_wd1_groups_do_not_mix_unless_asked() -> None:
    samples = toy.make_samples(toy.ALL_COMPLETIONS[:4], advantages=[0.5, -0.5, 0.0, 0.0])
    samples.group_B = torch.tensor([0, 0, 1, 1])
    clean = wd1_gradient(WD1(WD1Options()), samples)
    assert float(clean[2:].abs().max()) == 0.0  # equal rewards teach exactly nothing
    assert bool((clean[0, 1:] < 0).all())
    assert bool((clean[1, 1:] > 0).all())
    alone = toy.make_samples(toy.ALL_COMPLETIONS[:2], advantages=[0.5, -0.5])
    close(wd1_gradient(WD1(WD1Options()), alone), clean[:2] * 2)  # the mean over two groups
    mixed = wd1_gradient(WD1(WD1Options(variant="faithful")), samples)
    assert abs(float(mixed[0, 1])) < abs(float(wd1_gradient(WD1(WD1Options(variant="faithful")), alone)[0, 1]))
    positive = wd1_gradient(WD1(WD1Options(terms="positive")), samples)
    assert bool((positive[:, 1:] < 0).all())


def test_equal_rewards_teach_nothing() -> None:
    samples = toy.make_samples(toy.ALL_COMPLETIONS[:3], advantages=[0.0] * 3)
    assert float(wd1_gradient(WD1(WD1Options()), samples).abs().max()) == 0.0


# --- SPG ---


def spg_bounds(power: float, sets: list[set[int]]) -> tuple[float, float]:
    """Lower and upper bound per token on these masks."""
    samples = toy.make_samples()
    is_masked = toy.masks_of(sets, samples)
    views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
    logp_RS = toy.view_logp(views, samples.canvas)
    upper_B = likelihood.per_token_power_mean(
        logp_RS, views.is_target_RS, torch.full((len(sets),), 4), views.sample_R, 1, power
    )
    lower = (logp_RS.sum(-1) / views.is_target_RS.sum(-1)).mean()
    return float(lower), float(upper_B)


@pytest.mark.parametrize(
    ("power", "eubo", "mix"),
    [
        (1.0, -1.2003637677, -1.6645506569),
        (1.5, -1.2160643910, -1.6724009686),
        (2.0, -1.2221878197, -1.6754626829),
    ],
)
def test_golden_spg(power: float, eubo: float, mix: float) -> None:
    lower, upper = spg_bounds(power, [{1, 2, 3}, {3}])
    close(lower, -2.1287375461)
    close(upper, eubo)
    samples = toy.make_samples(advantages=[-1.0])
    is_masked = toy.masks_of([{1, 2, 3}, {3}], samples)
    views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
    logp_RS = toy.view_logp(views, samples.canvas)
    for negative, expected in (("mix", mix), ("eubo", eubo), ("elbo", -2.1287375461), ("zero", 0.0)):
        algorithm = SPG(SPGOptions.model_validate({"negative": negative, "power": power}))
        close(algorithm.loss(logp_RS, logp_RS, None, views, samples).value, expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_the_power_mean_increases_with_its_power(data: Any, num_views: int, length: int) -> None:
    """All views mask everything, so the limit at 0 is the mean log-prob; and it is never below it."""
    values = data.draw(st.lists(st.floats(-30, -0.01), min_size=num_views * length, max_size=num_views * length))
    logp_RS = torch.tensor(values, dtype=torch.float64).view(num_views, length)
    is_target_RS = torch.ones_like(logp_RS, dtype=torch.bool)
    length_R, sample_R = torch.full((num_views,), length), torch.zeros(num_views, dtype=torch.int64)

    def bound(power: float) -> float:
        return float(likelihood.per_token_power_mean(logp_RS, is_target_RS, length_R, sample_R, 1, power))

    values_of = [bound(power) for power in (1e-6, 0.1, 0.5, 1.0, 2.0, 8.0)]
    assert values_of == sorted(values_of) or max(np.diff(values_of) * -1) < 1e-9
    assert values_of[0] == pytest.approx(float(logp_RS.mean()), abs=1e-3)
    assert values_of[-1] <= float(logp_RS.max(0).values.mean()) + 1e-9


def test_the_power_mean_ignores_tokens_that_no_view_masks_and_never_underflows() -> None:
    logp_RS = torch.tensor([[-400.0, 0.0, -2.0], [-500.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    is_target_RS = torch.tensor([[True, False, True], [True, False, False]])
    value = likelihood.per_token_power_mean(logp_RS, is_target_RS, torch.tensor([3, 3]), torch.tensor([0, 0]), 1, 2.0)
    first = -400 + math.log(1.5 / 2) / 2
    second = -2 + math.log(1.5 / 2) / 2
    close(value, [(first + second) / 2], atol=1e-9)
    (grad,) = torch.autograd.grad(value.sum(), logp_RS)
    close(grad, [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]], atol=1e-9)


def test_block_random_shows_the_state_of_a_rollout() -> None:
    """Three blocks, two and a half scored: earlier ones noised, one partly masked, later ones and the tail masked."""
    samples = toy.make_samples([[0, 1, 2, 0, 1, 2]], prompts=[[2, 1]], scored_lengths=[5])
    samples.canvas.block_BS[0, 2:] = torch.tensor([0, 0, 1, 1, 2, 2])
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for is_published, seed in itertools.product((False, True), range(60)):
        views = plans.block_random(samples, Key(seed), num_views=2, prompt_noise=0.2, is_published=is_published)
        is_masked_RS = views.noisy_RS[:, 2:] == toy.MASK
        assert bool(is_masked_RS[:, 5].all())  # the tail
        for view in range(2):
            noise = views.context_RS[view] == toy.MASK
            # A block that is neither clean nor wholly masked, or the first with a mask that is no noise.
            drawn = is_masked_RS[view, :5] & ~noise[2:7]
            current = int(drawn.nonzero()[0]) // 2
            assert bool(is_masked_RS[view, 2 * current + 2 :].all())
            seen[is_published].add(current)
            targets = views.is_target_RS[view, 2:7]
            expected = is_masked_RS[view, :5].clone()
            if not is_published:
                expected[2 * current + 2 :] = False
            assert torch.equal(targets, expected)
            assert not bool(noise[2 + 2 * current :].any())
    assert seen[True] == seen[False] == {0, 1, 2}


@pytest.mark.parametrize(("is_published", "expected"), [(False, [0.2] * 5), (True, [0.25, 0.25, 0.25, 0.125, 0.125])])
def test_law_of_the_random_block(is_published: bool, expected: list[float]) -> None:
    """Eight blocks, five with scored tokens: uniform, or a permutation of eight modulo five."""
    num = 4000
    samples = toy.make_samples([[0] * 8] * num, scored_lengths=[5] * num)
    samples.canvas.block_BS[:, 1:] = torch.arange(8)
    views = plans.block_random(samples, Key(0), num_views=1, is_published=is_published)
    first_R = (views.noisy_RS[:, 1:] == toy.MASK).long().argmax(-1)
    share = torch.bincount(first_R, minlength=5).double() / num
    bound = 4 * (torch.tensor(expected).double() / num).sqrt()
    assert bool(((share - torch.tensor(expected).double()).abs() < bound).all())


def test_views_of_a_sample_take_different_blocks() -> None:
    samples = toy.make_samples([[0] * 6] * 50)
    samples.canvas.block_BS[:, 1:] = torch.arange(6) // 2
    views = plans.block_random(samples, Key(0), num_views=3)
    first_R = (views.noisy_RS[:, 1:] == toy.MASK).long().argmax(-1) // 2
    assert all(sorted(row) == [0, 1, 2] for row in first_R.view(50, 3).tolist())


# --- UniGRPO ---


def test_unigrpo_averages_over_views() -> None:
    """Two views of 1 and 3 masked tokens weigh the same; a view without a scored mask does not count."""
    samples = toy.make_samples([[0, 1, 2, 0]], advantages=[1.0])
    is_masked = toy.masks_of([{0}, {1, 2, 3}, set()], samples)
    views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
    algorithm = UniGRPO(UniGRPOOptions(beta=0.0))
    logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS.detach(), None, views, samples)
    (grad,) = torch.autograd.grad(loss.value, logp_RS)
    close(grad[:, 1:], [[-0.5, 0, 0, 0], [0, -1 / 6, -1 / 6, -1 / 6], [0, 0, 0, 0]], atol=1e-12)


def test_unigrpo_spreads_its_mask_ratios() -> None:
    samples = toy.make_samples([[0] * 200] * 30)
    views = UniGRPO(UniGRPOOptions(num_views=4)).corrupt(samples, Key(0))
    ratio_BM = views.is_target_RS.double().sum(-1).view(30, 4) / 200
    gaps = ratio_BM.sort(-1).values.diff(dim=-1)
    assert bool((gaps > 0.08).all())  # a quarter apart, but for the masks' own scatter
    narrow = UniGRPO(UniGRPOOptions(num_views=4, t_min=0.4, t_max=0.6)).corrupt(samples, Key(0))
    ratio_R = narrow.is_target_RS.double().sum(-1) / 200
    assert float(ratio_R.min()) > 0.25
    assert float(ratio_R.max()) < 0.75
    with pytest.raises(ValueError, match="exchange them"):
        UniGRPOOptions(t_min=0.7, t_max=0.3)


def test_samples_of_dataset_rows_have_no_trace() -> None:
    samples = dataclasses.replace(toy.make_samples(), step_map_BS=None)
    with pytest.raises(DareError, match="no step map"):
        TraceRL(TraceRLOptions()).corrupt(samples, Key(0))
