"""Golden numbers of the toy network, found by exact enumeration; each holds to 1e-9 unless float32 weights enter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dare.algorithms.coupled_grpo import CoupledGRPO, CoupledGRPOOptions
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.sft import SFT, SFTOptions
from dare.core.rng import Key
from dare.core.types import Samples
from dare.diffusion import corrupt, likelihood, supervised
from dare.diffusion.supervised import Noise
from dare.objectives.kl import estimate_kl
from tests.numerics import toy

ELBO, ELBO_SLOPE = -4.4783095268, -0.9556179371
TERMS = {1: -1.1804504199, 2: -2.1859872811, 3: -3.2879328565, 4: -4.4355513900}


def close(got: Tensor | float, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64).detach(),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=atol,
    )


def masked_logp(sets: list[set[int]], samples: Samples | None = None, theta: Tensor | float = toy.NEW) -> Tensor:
    """float64 [M, L]: log-prob of each masked completion token of the first sample; 0 where visible."""
    samples = toy.make_samples() if samples is None else samples
    is_masked_1MS = toy.masks_of(sets, samples)
    views = corrupt.assemble(samples, is_masked_1MS, is_masked_1MS, torch.ones(is_masked_1MS.shape))
    return toy.view_logp(views, samples.canvas, theta)[:, 1:5]


def term(size: int, theta: Tensor | float = toy.NEW) -> Tensor:
    """E over sets of this size of the sum of the masked tokens' log-probs."""
    return masked_logp(toy.subsets(4, size), theta=theta).sum(-1).mean()


def test_one_step_and_left_to_right() -> None:
    samples = toy.make_samples()
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    one_step = toy.view_logp(corrupt.all_masked(samples, Key(0)), samples.canvas, theta)[0, 1:]
    close(one_step, [-0.6266324576, -0.3367873138, -0.2179983964, -3.2541332222])
    close(one_step.sum(), -4.4355513900)
    close(torch.autograd.grad(one_step.sum(), theta)[0], -0.7352354968)

    samples = toy.make_samples(step_maps=[[0, 1, 2, 3]])
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    token_BS = likelihood.per_token(toy.view_logp(views, samples.canvas, theta), views.weight_RS, views.sample_R, 1)
    close(token_BS[0, 1:], [-0.6266324576, -0.4605896572, -0.4149626047, -3.0993284584])
    close(token_BS.sum(), -4.6015131779)
    close(torch.autograd.grad(token_BS.sum(), theta)[0], -1.0019985648)


def test_elbo_is_the_mean_over_orders_and_of_every_estimator() -> None:
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    for size, expected in TERMS.items():
        close(term(size), expected)
    elbo = sum(term(size, theta) / size for size in TERMS)
    close(elbo, ELBO)
    close(torch.autograd.grad(elbo, theta)[0], ELBO_SLOPE)
    orders = [
        sum(float(masked_logp([set(order[step:])])[0, order[step]]) for step in range(4))
        for order in itertools.permutations(range(4))
    ]
    close(float(np.mean(orders)), ELBO)
    close(math.log(np.mean(np.exp(orders))), -4.4329290016)
    close(sum((5 / size) * float(term(size)) for size in TERMS) / 5, ELBO)  # l from 0
    for num_nodes, expected in ((1, -4.4281260228), (2, ELBO), (5, ELBO)):  # Bernoulli(t), weight 1 / t, integrated
        nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
        total = 0.0
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            for size, value in TERMS.items():
                total += weight / node * math.comb(4, size) * node**size * (1 - node) ** (4 - size) * value
        close(total, expected)


@pytest.mark.parametrize(("lowest", "scale"), [(1, 4), (0, 5)])
def test_exact_count_is_unbiased(lowest: int, scale: int) -> None:
    """Every mask that the plan can draw carries C / l, so its exact expectation is the ELBO; sampled means agree."""
    samples = toy.make_samples([toy.COMPLETION] * 3000)
    views = corrupt.exact_count(samples, Key(1), num_views=2, lowest=lowest)
    size_R = views.is_target_RS.sum(-1)
    weights = {size: set((views.weight_RS[size_R == size].sum(-1) / size).tolist()) for size in range(lowest, 5)}
    for size in TERMS:
        assert weights[size] == {float(np.float32(scale / size / 2))}
    close(sum(2 * weights[size].pop() * TERMS[size] for size in TERMS) / scale, ELBO, atol=1e-6)

    sets, counts = torch.unique(views.is_target_RS[:, 1:5], dim=0, return_counts=True)
    assert len(sets) == 15 + (lowest == 0)
    for chosen, count in zip(sets, counts, strict=True):
        share = 1 / (5 - lowest) / math.comb(4, int(chosen.sum()))
        assert abs(float(count) / 6000 - share) < 5 * math.sqrt(share / 6000)
    sum_B = likelihood.per_sequence(toy.view_logp(views, samples.canvas), views.weight_RS, views.sample_R, 3000)
    assert abs(float(sum_B.mean()) - ELBO) < 4 * float(sum_B.std()) / math.sqrt(3000)


@pytest.mark.parametrize("plan", ["bernoulli", "complementary", "coupled_exact_count", "bernoulli_cosine"])
@pytest.mark.parametrize("block_length", [None, 1, 2, 3, 4])
def test_plans_estimate_the_elbo(plan: str, block_length: int | None) -> None:
    samples = toy.make_samples([toy.COMPLETION] * 4000, block_length=block_length)
    key = Key(5)
    if plan == "complementary":
        views = supervised.noised(samples, key, Noise(num_views=2, is_complementary=True, t_min=1e-4))
    elif plan == "coupled_exact_count":
        views = corrupt.coupled_exact_count(samples, key, num_pairs=1, scope=corrupt.scored_scope(samples))
    else:
        schedule = "cosine" if plan.endswith("cosine") else "linear"
        views = corrupt.bernoulli(samples, key, num_views=2, schedule=schedule, t_min=1e-4)
    sum_B = likelihood.per_sequence(toy.view_logp(views, samples.canvas), views.weight_RS, views.sample_R, 4000)
    expected = float(exact_block_elbo(samples, block_length or 4))
    assert abs(float(sum_B.mean()) - expected) < 4 * float(sum_B.std()) / math.sqrt(4000) + 2e-3


def exact_block_elbo(samples: Samples, block_length: int) -> Tensor:
    """Enumerated ELBO of the first sample, summed over blocks of positions."""
    one = toy.make_samples(block_length=block_length) if samples.canvas.is_blockwise else toy.make_samples()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 4, block_length):
        block = list(range(start, min(start + block_length, 4)))
        for size in range(1, len(block) + 1):
            sets = [{block[k] for k in chosen} for chosen in itertools.combinations(range(len(block)), size)]
            total = total + masked_logp(sets, one).sum(-1).mean() / size
    return total


@pytest.mark.parametrize(("block_length", "expected"), [(1, -4.4863565160), (2, -4.4430287095), (4, -4.4783095268)])
def test_block_elbo(block_length: int, expected: float) -> None:
    close(exact_block_elbo(toy.make_samples(block_length=block_length), block_length), expected)


def test_block_of_one_is_autoregressive_without_variance() -> None:
    """All masked, every plan scores each token given the clean tokens before it, with weight 1 in total."""
    samples = toy.make_samples(block_length=1)
    causal = [float(masked_logp([{k}], samples)[0, k]) for k in range(4)]
    for seed in range(5):
        views = corrupt.exact_count(samples, Key(seed), num_views=3)
        token_BS = likelihood.per_token(toy.view_logp(views, samples.canvas), views.weight_RS, views.sample_R, 1)
        close(token_BS[0, 1:], causal, atol=1e-6)


def test_coupled_token_estimate() -> None:
    samples = toy.make_samples(advantages=[1.0])
    sets = [{0, 1, 2, 3}, {1, 3}, {0, 2}]
    is_masked = toy.masks_of(sets, samples)
    weight = torch.tensor([1.0, 1 / 0.4, 1 / 0.6], dtype=torch.float64)[None, :, None] / 2 * torch.ones(1, 3, 5)
    sample_R = torch.zeros(3, dtype=torch.int64)
    token = {}
    for theta in (toy.NEW, toy.OLD):
        views = corrupt.assemble(samples, is_masked, is_masked, weight)
        logp_RS = toy.view_logp(views, samples.canvas, theta)
        token[theta] = likelihood.per_token(logp_RS, weight[0], sample_R, 1)[0, 1:]
    close(token[toy.NEW], [-0.7010498828, -1.1598470876, -0.4270435682, -4.4361005105])
    ratio = (token[toy.NEW] - token[toy.OLD]).exp()
    close(ratio, [0.9644814846, 0.9885021546, 1.0053718709, 0.9528696128])
    algorithm = CoupledGRPO(CoupledGRPOOptions(beta=0.0, variant="faithful"))
    old_RS = toy.view_logp(views, samples.canvas, toy.OLD)
    loss = algorithm.loss(toy.view_logp(views, samples.canvas), old_RS, None, views, samples)
    close(loss.value, -float(ratio.mean()), atol=1e-7)
    close(loss.metrics["ratio"].mean, float(ratio.mean()), atol=1e-7)


def test_coupled_expectation() -> None:
    """What the published weights estimate, integrated over t: about 1.5 times the log-likelihood."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    one_step = masked_logp([{0, 1, 2, 3}])[0]
    pair_4 = torch.zeros(4, dtype=torch.float64)
    for size in range(5):
        for chosen in toy.subsets(4, size):
            rest = set(range(4)) - chosen
            first, second = masked_logp([chosen, rest])
            for node, weight in zip(0.5 + 0.3 * nodes, weights / 2, strict=True):
                share = node**size * (1 - node) ** (4 - size)
                pair_4 += weight * share * (first / node + second / (1 - node))
    close((one_step + pair_4) / 2, [-0.73529204, -0.79199370, -0.44490932, -4.69177272], atol=1e-8)
    samples = toy.make_samples([toy.COMPLETION] * 4000)
    views = CoupledGRPO(CoupledGRPOOptions(variant="faithful")).corrupt(samples, Key(0))
    logp_RS = toy.view_logp(views, samples.canvas)
    sum_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, 4000)
    assert abs(float(sum_B.mean()) + 6.66396778) < 4 * float(sum_B.std()) / math.sqrt(4000)


def test_trace_replay() -> None:
    samples = toy.make_samples(step_maps=[[1, 0, 2, 1]])
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    for theta, expected in (
        (toy.NEW, [-0.6937156961, -0.3367873138, -0.3075834468, -3.7725841412]),
        (toy.OLD, [-0.6403029217, -0.3560642515, -0.3117539264, -3.6305986863]),
    ):
        logp_RS = toy.view_logp(views, samples.canvas, theta)
        close(likelihood.per_token(logp_RS, views.weight_RS, views.sample_R, 1)[0, 1:], expected)
    close(float(toy.view_logp(views, samples.canvas).sum()), -5.1106705979)


def test_sequence_ratio() -> None:
    samples = toy.make_samples(advantages=[1.0])
    is_masked = toy.masks_of([{0, 2}, {1, 2, 3}], samples)
    weight = torch.tensor([2.0, 4 / 3], dtype=torch.float64)[None, :, None] * torch.ones(1, 2, 5)
    views = corrupt.assemble(samples, is_masked, is_masked, weight / 2)
    policies = (toy.NEW, toy.OLD, toy.REFERENCE)
    logp = {theta: toy.view_logp(views, samples.canvas, theta) for theta in policies}
    elbo = {theta: likelihood.per_view(logp[theta], weight[0]) for theta in policies}
    close(elbo[toy.NEW], [-1.6938672577, -4.6325865349])
    close(elbo[toy.OLD], [-1.6442425559, -4.6112585454])
    difference = (elbo[toy.NEW] - elbo[toy.OLD]) / 4
    close(difference, [-0.0124061754, -0.0053319974])
    close(difference.mean().exp(), 0.9911701279)
    close((elbo[toy.NEW] - elbo[toy.OLD]).mean(), -0.0354763456)
    close(estimate_kl("k2", (elbo[toy.NEW] - elbo[toy.REFERENCE]).mean()) / 4, 0.0005656634)
    algorithm = ESPO(ESPOOptions(beta=0.5))
    loss = algorithm.loss(logp[toy.NEW], logp[toy.OLD], logp[toy.REFERENCE], views, samples)
    close(loss.value, -0.9911701279 + 0.5 * 0.0005656634, atol=1e-7)
    close(loss.metrics["ratio"].mean, 0.9911701279, atol=1e-7)


def test_on_policy_sequence_gradient() -> None:
    samples = toy.make_samples(advantages=[1.0])
    is_masked = toy.masks_of([{0, 2}, {1, 2, 3}], samples)
    views = corrupt.assemble(samples, is_masked, is_masked, torch.tensor([1.0, 2 / 3])[None, :, None].expand(1, 2, 5))
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    logp_RS = toy.view_logp(views, samples.canvas, theta)
    loss = ESPO(ESPOOptions(beta=0.0)).loss(logp_RS, logp_RS.detach(), None, views, samples)
    close(torch.autograd.grad(-loss.value, theta)[0], -0.0933780445, atol=1e-8)


def test_sft_loss() -> None:
    samples = toy.make_samples()
    is_masked = toy.masks_of([{0, 3}], samples)
    views = corrupt.assemble(samples, is_masked, is_masked, torch.full(is_masked.shape, 2.5))
    logp_RS = toy.view_logp(views, samples.canvas)
    close(-logp_RS[0, [1, 4]], [0.3027823376, 3.3521746335])
    loss = SFT(SFTOptions()).loss(logp_RS, logp_RS, None, views, samples)
    close(loss.value, 2.2843481069)
    close(loss.metrics["nll_masked"].mean, 1.8274784856)


@pytest.mark.parametrize("step_map", [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 2, 1], [3, 1, 0, 2]])
@pytest.mark.parametrize("block_length", [None, 2])
def test_likelihoods_of_a_fixed_step_map_sum_to_one(step_map: list[int], block_length: int | None) -> None:
    assert sum_of_trace_likelihoods([step_map] * 81, block_length) == pytest.approx(1.0, abs=1e-12)


def test_likelihoods_of_positions_chosen_by_the_distribution_sum_to_one() -> None:
    """The order is a function of the tokens then, so each sequence has one trace, and its likelihood is exact."""
    step_maps = [max_prob_step_map(tokens) for tokens in toy.ALL_COMPLETIONS]
    assert len({tuple(step_map) for step_map in step_maps}) > 1
    assert sum_of_trace_likelihoods(step_maps, None) == pytest.approx(1.0, abs=1e-12)
    index = toy.ALL_COMPLETIONS.index(toy.COMPLETION)
    samples = toy.make_samples(step_maps=[step_maps[index]])
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    close(float(toy.view_logp(views, samples.canvas).sum()), -3.7873821979)


@pytest.mark.parametrize(("block_length", "expected"), [(1, 1.0), (2, 0.9897420284), (4, 0.8960794162)])
def test_elbos_sum_to_less_than_one(block_length: int, expected: float) -> None:
    """Equality only for blocks of one token."""
    samples = toy.make_samples(toy.ALL_COMPLETIONS, block_length=block_length)
    elbo_B = torch.zeros(81, dtype=torch.float64)
    for start in range(0, 4, block_length):
        for size in range(1, block_length + 1):
            sets = [{start + k for k in chosen} for chosen in toy.subsets(block_length, size)]
            is_masked = toy.masks_of(sets, samples).expand(81, -1, -1)
            views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
            view_R = likelihood.per_view(toy.view_logp(views, samples.canvas), views.weight_RS)
            elbo_B += view_R.view(81, len(sets)).mean(-1) / size
    close(elbo_B.exp().sum(), expected)


def sum_of_trace_likelihoods(step_maps: list[list[int]], block_length: int | None) -> float:
    samples = toy.make_samples(toy.ALL_COMPLETIONS, step_maps=step_maps, block_length=block_length)
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    logp_RS = toy.view_logp(views, samples.canvas)
    return float(likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, 81).exp().sum())


def max_prob_step_map(tokens: list[int]) -> list[int]:
    """Steps at which a sampler that fills the most certain position first would produce `tokens`."""
    step_map = [-1] * 4
    for step in range(4):
        certainty = {}
        for k in [k for k in range(4) if step_map[k] < 0]:
            noisy = [*toy.PROMPT, *(token if step_map[j] >= 0 else toy.MASK for j, token in enumerate(tokens))]
            rows = torch.tensor([noisy] * 3)
            samples = toy.make_samples([toy.COMPLETION] * 3)
            target = torch.arange(3)[:, None].expand(3, 5)
            certainty[k] = float(toy.logp(rows, rows, target, samples.canvas, toy.NEW)[:, 1 + k].max())
        step_map[max(certainty, key=lambda k: certainty[k])] = step
    return step_map
