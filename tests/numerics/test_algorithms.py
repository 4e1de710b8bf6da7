"""The five algorithms: identities at the old policy, scale, invariance, and what each counts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.algorithms.cj_grpo import CJGRPO, CJGRPOOptions
from dare.algorithms.coupled_grpo import CoupledGRPO, CoupledGRPOOptions
from dare.algorithms.d1 import D1, D1Options
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.policy import PolicyAlgorithm
from dare.algorithms.sft import SFT, SFTOptions
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, likelihood
from tests.numerics import toy

ONLINE: dict[str, PolicyAlgorithm[Any]] = {
    "d1": D1(D1Options()),
    "coupled_grpo": CoupledGRPO(CoupledGRPOOptions(num_pairs=2)),
    "espo": ESPO(ESPOOptions(beta=0.01)),
    "espo_keep_masked": ESPO(ESPOOptions(beta=0.01, tail="keep_masked")),
    "cj_grpo": CJGRPO(CJGRPOOptions()),
    "cj_grpo_faithful": CJGRPO(CJGRPOOptions(variant="faithful")),
}
EVERY: dict[str, Algorithm[Any]] = {
    **ONLINE,
    "sft": SFT(SFTOptions(views_per_sample=3)),
    "sft_token": SFT(SFTOptions(norm="token")),
    "sft_pairs": SFT(SFTOptions(views_per_sample=2, is_complementary=True, norm="batch")),
}
online = pytest.mark.parametrize("name", list(ONLINE))
every = pytest.mark.parametrize("name", list(EVERY))

COMPLETIONS = [[0, 2, 1, 0], [1, 1, 2], [2, 0, 0, 1, 2], [0, 0]]
SCORED = [4, 2, 3, 2]
STEPS = [[1, 0, 2, 1], [0, 1, 1], [2, 1, 0, 0, 3], [0, 1]]
ADVANTAGES = [1.0, -0.5, 0.75, -1.25]


def samples_of(
    rows: tuple[int, ...] = (0, 1, 2, 3), *, num_padding: int = 0, block_length: int | None = None
) -> Samples:
    return toy.make_samples(
        [COMPLETIONS[row] for row in rows],
        prompts=[[2] * (1 + row % 2) for row in rows],
        scored_lengths=[SCORED[row] for row in rows],
        step_maps=[STEPS[row] for row in rows],
        advantages=[ADVANTAGES[row] for row in rows],
        sample_ids=list(rows),
        block_length=block_length,
        num_padding=num_padding,
    )


def evaluate(algorithm: Algorithm[Any], samples: Samples, views: Views, theta: Tensor | float = toy.NEW) -> Any:
    old_RS = toy.view_logp(views, samples.canvas, toy.OLD)
    reference_RS = toy.view_logp(views, samples.canvas, toy.REFERENCE) if algorithm.needs_reference else None
    return algorithm.loss(toy.view_logp(views, samples.canvas, theta), old_RS, reference_RS, views, samples)


@pytest.mark.parametrize("module", ["sft", "d1", "coupled_grpo", "espo", "cj_grpo"])
def test_importing_an_algorithm_does_not_load_torch(module: str) -> None:
    code = f"import dare.algorithms.{module}, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@online
@pytest.mark.parametrize("block_length", [None, 2])
def test_identities_at_the_old_policy(name: str, block_length: int | None) -> None:
    """Ratio 1, nothing clipped, no KL; the gradient is that of -advantage * log-likelihood in the algorithm's scale."""
    algorithm, samples = ONLINE[name], samples_of(block_length=block_length)
    views = algorithm.corrupt(samples, Key(0))
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    logp_RS = toy.view_logp(views, samples.canvas, theta)
    loss = algorithm.loss(logp_RS, logp_RS.detach(), logp_RS.detach(), views, samples)
    assert loss.metrics["ratio"].mean == pytest.approx(1.0, abs=1e-12)
    assert loss.metrics["clip_fraction"].mean == 0.0
    assert loss.metrics["kl"].mean == pytest.approx(0.0, abs=1e-12)
    weight_BS = item_weights(name, samples, views)
    advantage_B = samples.advantage_B.double()
    assert float(loss.value.detach()) == pytest.approx(-float((weight_BS.sum(-1) * advantage_B).sum()), abs=1e-9)

    weight_RS = views.weight_RS.double() * weight_BS[views.sample_R]
    if name.startswith("espo"):  # one item per sequence, of log-likelihood / L
        length_B = corrupt.completion_scope(samples, algorithm.options.tail).is_target_BS.sum(-1)
        weight_RS = views.weight_RS.double() / (len(COMPLETIONS) * length_B[views.sample_R, None])
    surrogate = -(weight_RS * advantage_B[views.sample_R, None] * logp_RS).sum()
    (got,) = torch.autograd.grad(loss.value, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(surrogate, theta)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def item_weights(name: str, samples: Samples, views: Views) -> Tensor:
    """float64 [B, S]: what each token's term weighs in the loss; for sequences the first position stands for it."""
    if name.startswith("espo"):
        weight_BS = torch.zeros(samples.canvas.input_BS.shape, dtype=torch.float64)
        weight_BS[:, 0] = 1 / len(COMPLETIONS)
        return weight_BS
    if name == "cj_grpo_faithful":
        step_BS = corrupt.step_ranks(samples.step_map_BS, samples.canvas.block_BS.clamp(min=0))  # type: ignore[arg-type]
        count_T = torch.bincount(step_BS[step_BS >= 0])
        return torch.where(step_BS >= 0, 1 / count_T[step_BS].double() / len(count_T), 0.0)
    return samples.is_scored_BS.double() / samples.is_scored_BS.sum()


@every
@pytest.mark.parametrize("block_length", [None, 2])
def test_order_and_padding_do_not_matter(name: str, block_length: int | None) -> None:
    algorithm = EVERY[name]
    reference = samples_of(block_length=block_length)
    expected = evaluate(algorithm, reference, algorithm.corrupt(reference, Key(6)))
    for rows, num_padding in (((3, 1, 0, 2), 0), ((0, 1, 2, 3), 6), ((1, 0, 3, 2), 2)):
        samples = samples_of(rows, num_padding=num_padding, block_length=block_length)
        got = evaluate(algorithm, samples, algorithm.corrupt(samples, Key(6)))
        torch.testing.assert_close(got.value, expected.value, rtol=1e-12, atol=1e-12)
        for metric, value in expected.metrics.items():
            assert got.metrics[metric].mean == pytest.approx(value.mean, rel=1e-12, abs=1e-12)


@online
def test_policies_enter_with_the_right_sign(name: str) -> None:
    """A step along the negative gradient raises log-likelihoods of positive and lowers those of negative samples."""
    algorithm, samples = ONLINE[name], samples_of()
    views = algorithm.corrupt(samples, Key(2))
    logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS.detach(), logp_RS.detach(), views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    sign_RS = torch.sign(samples.advantage_B)[views.sample_R, None].expand_as(grad_RS)
    is_moved = grad_RS != 0
    assert bool(is_moved.any())
    assert torch.equal(torch.sign(grad_RS[is_moved]), -sign_RS[is_moved].double())
    assert not bool((is_moved & ~views.is_target_RS).any())


@online
def test_the_kl_pulls_towards_the_reference(name: str) -> None:
    """With zero advantages the loss is the KL alone: least at the reference, and independent of the old policy."""
    algorithm, samples = ONLINE[name], samples_of()
    samples.advantage_B.zero_()
    views = algorithm.corrupt(samples, Key(2))
    values = {theta: float(evaluate(algorithm, samples, views, theta).value) for theta in (0.6, toy.REFERENCE, 1.0)}
    assert values[toy.REFERENCE] == pytest.approx(0.0, abs=1e-12)
    assert values[0.6] > 0
    assert values[1.0] > 0
    far = algorithm.loss(
        toy.view_logp(views, samples.canvas),
        toy.view_logp(views, samples.canvas, 0.1),
        toy.view_logp(views, samples.canvas, toy.REFERENCE),
        views,
        samples,
    )
    assert float(far.value) == pytest.approx(values[1.0])


@pytest.mark.parametrize(
    ("algorithm", "is_needed"),
    [
        (D1(D1Options()), True),
        (D1(D1Options(beta=0.0)), False),
        (ESPO(ESPOOptions()), True),
        (ESPO(ESPOOptions(beta=0.0)), False),
        (SFT(SFTOptions()), False),
    ],
)
def test_the_reference_is_needed_only_for_a_kl(algorithm: Algorithm[Any], is_needed: bool) -> None:
    assert algorithm.needs_reference == is_needed


@pytest.mark.parametrize(("variant", "scale"), [("faithful", 1.5), ("clean", 1.0)])
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_scale_of_coupled_log_probs(variant: str, scale: float, num_pairs: int) -> None:
    """Weights of a token sum to `scale` in the mean (5 / 3 for the published ones with two pairs); most at t = 0.2."""
    samples = toy.make_samples([[0] * 8] * 1500)
    algorithm = CoupledGRPO(CoupledGRPOOptions.model_validate({"variant": variant, "num_pairs": num_pairs}))
    views = algorithm.corrupt(samples, Key(0))
    one_RS = views.is_target_RS.double()
    token_BS = likelihood.per_token(one_RS, views.weight_RS, views.sample_R, 1500)[:, 1:]
    expected = scale if num_pairs == 1 or variant == "clean" else 5 / 3
    sample_mean_B = token_BS.mean(-1)
    assert abs(float(sample_mean_B.mean()) - expected) < 4 * float(sample_mean_B.std()) / 1500**0.5
    largest = (1 + 5 * num_pairs) / (1 + num_pairs * (1 if variant == "faithful" else 2))
    assert 0.8 * largest < float(token_BS.max()) < largest + 1e-6


def test_clipping_is_asymmetric_and_capped() -> None:
    samples = toy.make_samples([[0], [0]], advantages=[1.0, -1.0], step_maps=[[0], [0]])
    views = corrupt.all_masked(samples, Key(0))
    old_RS = torch.zeros(2, 2)
    algorithm = D1(D1Options(beta=0.0, eps=0.1, eps_high=0.3, dual_clip=3.0))
    for log_ratio, expected in ((2.0, (-1.3 + 3.0) / 2), (-2.0, (-(2.718281828**-2) + 0.9) / 2), (0.05, 0.0)):
        logp_RS = torch.full((2, 2), log_ratio) * views.is_target_RS
        loss = algorithm.loss(logp_RS, old_RS, None, views, samples)
        assert float(loss.value) == pytest.approx(expected, abs=1e-6)


def test_token_means_weigh_tokens_and_sequence_means_weigh_samples() -> None:
    """Two samples of 4 and 1 tokens with constant log-ratio 0: the loss is the weighted mean of -advantage."""
    samples = toy.make_samples([[0, 1, 2, 0], [1]], advantages=[1.0, -0.5], step_maps=[[0, 1, 2, 3], [0]])
    for name, expected in (("d1", -(4 - 0.5) / 5), ("coupled_grpo", -(4 - 0.5) / 5), ("espo", -(1 - 0.5) / 2)):
        loss = evaluate_on_policy(ONLINE[name], samples)
        assert loss == pytest.approx(expected), name
    assert evaluate_on_policy(ONLINE["cj_grpo"], samples) == pytest.approx(-(4 - 0.5) / 5)
    assert evaluate_on_policy(ONLINE["cj_grpo_faithful"], samples) == pytest.approx(-((1 - 0.5) / 2 + 3) / 4)


def evaluate_on_policy(algorithm: PolicyAlgorithm[Any], samples: Samples) -> float:
    views = algorithm.corrupt(samples, Key(0))
    logp_RS = toy.view_logp(views, samples.canvas)
    return float(algorithm.loss(logp_RS, logp_RS, logp_RS, views, samples).value)


def test_clean_replay_leaves_out_the_tail_and_faithful_keeps_it() -> None:
    samples = toy.make_samples([[0, 1, 2, 2]], scored_lengths=[2], step_maps=[[0, 2, 1, 3]])
    clean = ONLINE["cj_grpo"].corrupt(samples, Key(0))
    faithful = ONLINE["cj_grpo_faithful"].corrupt(samples, Key(0))
    assert clean.view_R.tolist() == [0, 2]
    assert faithful.view_R.tolist() == [0, 1, 2, 3]
    assert int(clean.is_target_RS.sum()) == 2
    assert int(faithful.is_target_RS.sum()) == 4


@online
def test_score_temperature(name: str) -> None:
    samples = samples_of()
    samples.rollout_temperature = 0.7
    algorithm = ONLINE[name]
    assert algorithm.corrupt(samples, Key(0)).temperature == 0.7
    fixed = type(algorithm)(algorithm.options.model_copy(update={"score_temperature": "one"}))
    assert fixed.corrupt(samples, Key(0)).temperature == 1.0


def test_sft_is_the_mean_nll_when_everything_is_masked() -> None:
    samples = samples_of()
    is_masked = samples.is_scored_BS[:, None]
    views = corrupt.assemble(samples, is_masked, is_masked, torch.ones(is_masked.shape))
    logp_RS = toy.view_logp(views, samples.canvas)
    nll_B, length_B = -logp_RS.sum(-1), samples.is_scored_BS.sum(-1)
    for norm, expected in (
        ("sequence", (nll_B / length_B).mean()),
        ("token", nll_B.sum() / length_B.sum()),
        ("batch", nll_B.mean()),
    ):
        loss = SFT(SFTOptions.model_validate({"norm": norm})).loss(logp_RS, logp_RS, None, views, samples)
        torch.testing.assert_close(loss.value, expected)
        assert loss.metrics["mask_ratio"].mean == 1.0


def test_sft_of_a_batch_is_the_mean_over_its_samples() -> None:
    algorithm = SFT(SFTOptions(views_per_sample=2))
    whole = samples_of()
    total = evaluate(algorithm, whole, algorithm.corrupt(whole, Key(8))).value
    singles = []
    for row in range(4):
        samples = samples_of((row,))
        singles.append(evaluate(algorithm, samples, algorithm.corrupt(samples, Key(8))).value)
    torch.testing.assert_close(total, torch.stack(singles).mean(), rtol=1e-12, atol=1e-12)


def test_sft_is_minus_the_elbo_per_token() -> None:
    samples = toy.make_samples([toy.COMPLETION] * 3000)
    algorithm = SFT(SFTOptions(views_per_sample=2, t_min=1e-4))
    views = algorithm.corrupt(samples, Key(0))
    value_B = likelihood.per_sequence(toy.view_logp(views, samples.canvas), views.weight_RS, views.sample_R, 3000)
    loss = evaluate(algorithm, samples, views)
    assert float(loss.value) == pytest.approx(-float(value_B.mean()) / 4)
    assert abs(float(loss.value) - 4.4783095268 / 4) < 4 * float(value_B.std()) / 4 / 3000**0.5 + 1e-3


def test_sft_leaves_unscored_tokens_visible() -> None:
    samples = toy.make_samples([[0, 1, 2, 0, 1, 2]], prompts=[[1, 2]])
    samples.is_scored_BS[0, 4:6] = False  # a user's turn between two assistant turns
    for seed in range(20):
        views = SFT(SFTOptions()).corrupt(samples, Key(seed))
        assert torch.equal(views.noisy_RS[:, 4:6], views.target_RS[:, 4:6])


def test_sft_without_a_mask_contributes_nothing() -> None:
    samples = toy.make_samples([[0]] * 64)
    views = SFT(SFTOptions()).corrupt(samples, Key(0))
    is_empty_R = ~views.is_target_RS.any(-1)
    assert 10 < int(is_empty_R.sum()) < 54
    logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
    loss = SFT(SFTOptions()).loss(logp_RS, logp_RS.detach(), None, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    assert float(grad_RS[is_empty_R].abs().max()) == 0.0
    assert float(grad_RS[~is_empty_R].sum(-1).min()) < 0
    assert loss.metrics["has_mask"].mean == pytest.approx(1 - float(is_empty_R.float().mean()))


@pytest.mark.parametrize(
    ("options", "bad", "message"),
    [
        (SFTOptions, {"is_complementary": True}, "even views_per_sample"),
        (SFTOptions, {"is_complementary": True, "views_per_sample": 2, "schedule": "cosine"}, "schedule: linear"),
        (SFTOptions, {"t_min": 0.0}, "greater than 0"),
        (CoupledGRPOOptions, {"t_min": 0.9}, "exchange them"),
        (D1Options, {"eps": 1.5}, "less than 1"),
        (ESPOOptions, {"num_mc": 0}, "greater than or equal to 1"),
        (CJGRPOOptions, {"advantage": "median"}, "'mean', 'loo'"),
        (D1Options, {"epsilon": 0.2}, "Extra inputs"),
    ],
)
def test_impossible_options_are_refused(options: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options.model_validate(bad)


def test_every_option_is_described() -> None:
    for algorithm in EVERY.values():
        for field in type(algorithm).Config.model_fields.values():
            assert field.description
            assert not field.is_required()
