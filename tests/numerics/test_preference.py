"""Preference losses: the numbers of public code, and what must hold of any of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.algorithms.dpo import DPO, DPOOptions
from dare.algorithms.dtrpo import DTRPO, DTRPOOptions
from dare.algorithms.ipo import IPO, IPOOptions
from dare.algorithms.kto import KTO, KTOOptions
from dare.algorithms.preference import pair_rows
from dare.algorithms.vrpo import VRPO, VRPOOptions
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, likelihood, plans
from dare.diffusion.counts import rounded_counts, stratified_counts
from dare.families.base import Family
from dare.objectives.preference import kto_loss, pair_loss
from tests.golden_checkpoints import load_golden
from tests.numerics import toy

GOLDEN = Path(__file__).parent.parent / "golden" / "sft"
PAIRS: dict[str, Algorithm[Any]] = {
    "vrpo": VRPO(VRPOOptions(views_per_sample=3)),
    "vrpo_length": VRPO(VRPOOptions(views_per_sample=3, norm="length", sft_weight=0.1)),
    "vrpo_shared": VRPO(VRPOOptions(views_per_sample=2, sides="shared", label_smoothing=0.1)),
    "vrpo_hinge": VRPO(VRPOOptions(views_per_sample=2, link="hinge")),
    "dpo": DPO(DPOOptions()),
    "ipo": IPO(IPOOptions(views_per_sample=2)),
    "dtrpo": DTRPO(DTRPOOptions(tokens_per_step=2)),
}
EVERY: dict[str, Algorithm[Any]] = {
    **PAIRS,
    "kto": KTO(KTOOptions(views_per_sample=2)),
    "kto_zero": KTO(KTOOptions(views_per_sample=2, baseline="zero", weight_bad=1.5)),
}
pairs = pytest.mark.parametrize("name", list(PAIRS))
every = pytest.mark.parametrize("name", list(EVERY))
both = pytest.mark.parametrize("block_length", [None, 2])

COMPLETIONS = [[0, 2, 1, 0], [1, 1, 2], [2, 0, 0, 1, 2], [0, 0], [1, 2, 0, 1], [2, 2, 2]]


def samples_of(rows: tuple[int, ...] = (0, 1, 2, 3, 4, 5), *, block_length: int | None = None) -> Samples:
    """Three pairs of unequal lengths; even rows are the chosen ones."""
    samples = toy.make_samples(
        [COMPLETIONS[row] for row in rows],
        prompts=[[2] * (1 + row // 2) for row in rows],
        sample_ids=[row + 7 for row in rows],
        block_length=block_length,
    )
    return dataclasses.replace(
        samples,
        group_B=torch.tensor([row // 2 for row in rows]),
        reward_B=torch.tensor([1.0 - row % 2 for row in rows]),
    )


def evaluate(algorithm: Algorithm[Any], samples: Samples, views: Views, theta: Tensor | float = toy.NEW) -> Any:
    reference_RS = toy.view_logp(views, samples.canvas, toy.REFERENCE)
    logp_RS = toy.view_logp(views, samples.canvas, theta)
    return algorithm.loss(logp_RS, torch.zeros_like(logp_RS), reference_RS, views, samples)


# 1. The numbers of public code


@functools.cache
def load() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "vrpo.json").read_text()), load_file(GOLDEN / "vrpo.safetensors")


def golden_pairs(name: str) -> tuple[Family, Samples, Views, dict[str, Any], dict[str, Tensor]]:
    """The stored rows without their padding, as our canvases, and the stored masks as views."""
    facts, tensors = load()[0][name], {k.split("/")[1]: v for k, v in load()[1].items() if k.startswith(f"{name}/")}
    family, is_real_BT = load_golden(name), tensors["attention_mask"].bool()
    rows = [ids[is_real].tolist() for ids, is_real in zip(tensors["input_ids"], is_real_BT, strict=True)]
    lengths = tensors["response_len"].tolist()
    canvas = family.canvas(
        [row[:-length] for row, length in zip(rows, lengths, strict=True)],
        [row[-length:] for row, length in zip(rows, lengths, strict=True)],
    )
    is_masked_BMS = torch.zeros((4, facts["n_draws"], canvas.length), dtype=torch.bool)
    for row, is_real in enumerate(is_real_BT):
        is_masked_BMS[row, :, : int(is_real.sum())] = tensors["masks"][row][:, is_real].bool()
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.arange(4),
        advantage_B=torch.zeros(4),
        group_B=torch.tensor([0, 0, 1, 1]),
        mask_id=facts["mask_id"],
        reward_B=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )
    length_B11 = torch.tensor(lengths)[:, None, None]
    weight_BMS = (length_B11 / is_masked_BMS.sum(-1, keepdim=True) / facts["n_draws"]).expand_as(is_masked_BMS)
    return family, samples, corrupt.assemble(samples, is_masked_BMS, is_masked_BMS, weight_BMS), facts, tensors


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_vrpo_of_public_code(name: str) -> None:
    """ELBOs of every draw, scores, losses and gradients; their division by the padded width is a smaller beta."""
    family, samples, views, facts, tensors = golden_pairs(name)
    assert torch.equal((views.noisy_RS == facts["mask_id"]).sum(-1).view(4, -1), tensors["counts"])
    logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    num = facts["n_draws"]
    elbo_R = num * likelihood.per_view(logp_RS, views.weight_RS)
    torch.testing.assert_close(elbo_R.detach().float().view(4, num), tensors["elbo_policy"], rtol=0, atol=1e-3)

    # Of the reference only the ELBOs are stored: all of one is put on the first target of its view.
    reference_RS = torch.zeros_like(logp_RS)
    first_R = views.is_target_RS.int().argmax(-1)
    row_R = torch.arange(views.num_views)
    weight_R = views.weight_RS[row_R, first_R]
    reference_RS[row_R, first_R] = tensors["elbo_reference"].flatten() / num / weight_R
    algorithm = VRPO(VRPOOptions(beta=facts["beta"], views_per_sample=num))
    _, margin_B = algorithm.margins(logp_RS.detach(), reference_RS, views, samples)
    torch.testing.assert_close((margin_B[::2] - margin_B[1::2]).float(), tensors["score"], rtol=0, atol=1e-3)
    for loss_name, beta in (("beta_summed", facts["beta"]), ("beta_over_R", facts["beta"] / facts["response_width"])):
        options = VRPOOptions(beta=beta, views_per_sample=num)
        loss = VRPO(options).loss(logp_RS, logp_RS, reference_RS, views, samples)
        assert float(loss.value.detach()) == pytest.approx(facts["losses"][loss_name], rel=5e-5)
        family.network.zero_grad()
        loss.value.backward(retain_graph=True)
        grads = {key: p.grad.clone() for key, p in family.network.named_parameters() if p.grad is not None}
        if "model.embed_tokens.weight" in grads and family.spec.is_shifted:
            grads["model.embed_tokens.weight"][family.spec.pad_id] = 0.0  # their embedding never trains its padding
        assert grads.keys() == facts["grad_norms"][loss_name].keys()
        for key, expected in facts["grad_norms"][loss_name].items():
            assert float(grads[key].norm()) == pytest.approx(expected, rel=5e-4, abs=1e-9), key


def test_their_link_function() -> None:
    facts, tensors = load()
    chosen, rejected, chosen_reference, rejected_reference = tensors["dpo_link/logp"].double()
    score_P = (chosen - rejected) - (chosen_reference - rejected_reference)
    for beta, expected in facts["dpo_link"]["losses"].items():
        assert float(pair_loss("logistic", score_P, float(beta)).mean()) == pytest.approx(expected, rel=1e-5)


def test_their_count_tables_and_ours() -> None:
    """`counts: rounded` is their rule, entry by entry; the default is the integer rule, which differs in some."""
    rows = load()[1]["counts/rows"]
    num_different = 0
    for row in rows.tolist():
        length, num, first = row[:3]
        view = torch.arange(num)
        uniform = torch.tensor((first - 0.5) / length, dtype=torch.float64)
        assert rounded_counts(uniform, torch.tensor(length), num, 1, view).tolist() == row[3 : 3 + num]
        ours = stratified_counts(uniform, torch.tensor(length), num, 1, view)
        assert ours.tolist() == [1 + (first - 1 + j * length // num) % length for j in range(num)]
        num_different += ours.tolist() != row[3 : 3 + num]
    assert num_different == 20
    for name in ("llada", "dream"):
        lengths, firsts = load()[1][f"{name}/response_len"], load()[1][f"{name}/l0"]
        uniform_B1 = ((firsts.double() - 0.5) / lengths)[:, None]
        ours = stratified_counts(uniform_B1, lengths[:, None], 4, 1, torch.arange(4)[None])
        assert torch.equal(ours, load()[1][f"{name}/counts_floor"])


# 2. What must hold


@every
@both
def test_at_the_reference(name: str, block_length: int | None) -> None:
    """Equal views make every score exactly 0, whatever was drawn: logistic loss log 2, and a gradient that is not 0."""
    algorithm, samples = EVERY[name], samples_of(block_length=block_length)
    for seed in range(5):
        views = algorithm.corrupt(samples, Key(seed))
        logp_RS = toy.view_logp(views, samples.canvas).requires_grad_()
        loss = algorithm.loss(logp_RS, logp_RS.detach(), logp_RS.detach(), views, samples)
        assert loss.metrics["reward_accuracy"].mean == 0.5
        assert loss.metrics["chosen_reward"].mean == 0.0
        if name in ("vrpo", "vrpo_shared", "dpo", "dtrpo"):
            assert float(loss.value.detach()) == pytest.approx(math.log(2), abs=1e-12)
        if name == "ipo":
            assert float(loss.value.detach()) == pytest.approx(25.0)
        (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
        sign_R1 = 1 - 2 * samples.reward_B[views.sample_R, None]
        has_grad = grad_RS != 0
        assert bool(has_grad.any())
        assert torch.equal(torch.sign(grad_RS)[has_grad], sign_R1.expand_as(grad_RS)[has_grad].double())


@pairs
@both
def test_swapping_the_sides_turns_the_score(name: str, block_length: int | None) -> None:
    algorithm, samples = PAIRS[name], samples_of(block_length=block_length)
    views = algorithm.corrupt(samples, Key(3))
    swapped = dataclasses.replace(samples, reward_B=1 - samples.reward_B)  # type: ignore[operator]
    loss, other = evaluate(algorithm, samples, views), evaluate(algorithm, swapped, views)
    assert loss.metrics["reward_margin"].mean == pytest.approx(-other.metrics["reward_margin"].mean, rel=1e-12)
    assert loss.metrics["reward_accuracy"].mean == pytest.approx(1 - other.metrics["reward_accuracy"].mean)
    assert loss.metrics["chosen_elbo"].mean == pytest.approx(other.metrics["rejected_elbo"].mean)


@every
@both
def test_order_changes_nothing_and_a_step_lowers_the_loss(name: str, block_length: int | None) -> None:
    algorithm = EVERY[name]
    reference = samples_of(block_length=block_length)
    expected = evaluate(algorithm, reference, algorithm.corrupt(reference, Key(6)))
    shuffled = samples_of((3, 4, 0, 1, 5, 2), block_length=block_length)
    got = evaluate(algorithm, shuffled, algorithm.corrupt(shuffled, Key(6)))
    torch.testing.assert_close(got.value, expected.value, rtol=1e-12, atol=1e-12)
    for metric, value in expected.metrics.items():
        assert got.metrics[metric].mean == pytest.approx(value.mean, rel=1e-12, abs=1e-12)
    views = algorithm.corrupt(reference, Key(6))
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    before = evaluate(algorithm, reference, views, theta).value
    (slope,) = torch.autograd.grad(before, theta)
    after = evaluate(algorithm, reference, views, float(theta.detach() - 1e-3 * slope))
    assert float(after.value) < float(before.detach())


@every
def test_the_replayed_gradient_is_that_of_the_whole_graph(name: str) -> None:
    """The score is a sum over views inside a nonlinear loss; replayed view by view it has the same gradient."""
    algorithm, samples = EVERY[name], samples_of()
    views = algorithm.corrupt(samples, Key(2))
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(evaluate(algorithm, samples, views, theta).value, theta)
    leaf = toy.view_logp(views, samples.canvas, theta).detach().requires_grad_()
    reference_RS = toy.view_logp(views, samples.canvas, toy.REFERENCE)
    (grad_RS,) = torch.autograd.grad(algorithm.loss(leaf, leaf, reference_RS, views, samples).value, leaf)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(views.num_views):
        one = views.rows(slice(row, row + 1))
        total += torch.autograd.grad((grad_RS[row] * toy.view_logp(one, samples.canvas, theta)).sum(), theta)[0]
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


def test_shared_sides_use_the_same_random_numbers() -> None:
    """Two completions of one length get the same masks; independent ones do not."""
    samples = dataclasses.replace(
        toy.make_samples([[0, 1, 2, 0, 1, 2]] * 2, sample_ids=[5, 9]), reward_B=torch.tensor([1.0, 0.0])
    )
    for sides, is_equal in (("shared", True), ("independent", False)):
        views = VRPO(VRPOOptions.model_validate({"sides": sides})).corrupt(samples, Key(0))
        assert torch.equal(views.is_target_RS[views.sample_R == 0], views.is_target_RS[views.sample_R == 1]) == is_equal


def test_many_times_with_one_mask_have_less_variance_than_one_draw() -> None:
    """The score of a fixed policy over many seeds, at eight views and at one."""
    samples = samples_of((0, 1))
    spread = {}
    for num_views in (1, 8):
        algorithm = VRPO(VRPOOptions(views_per_sample=num_views))
        scores = []
        for seed in range(200):
            views = algorithm.corrupt(samples, Key(seed))
            scores.append(evaluate(algorithm, samples, views).metrics["reward_margin"].mean)
        spread[num_views] = torch.tensor(scores)
    assert float(spread[8].var()) < float(spread[1].var()) / 4
    error = float((spread[1].var() / 200 + spread[8].var() / 200).sqrt())
    assert abs(float(spread[1].mean() - spread[8].mean())) < 4 * error


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3])
@both
def test_a_random_step_estimates_the_trajectory(tokens_per_step: int, block_length: int | None) -> None:
    """One token per step: the ELBO. Every token is scored with the right expected weight at any number of tokens."""
    samples = toy.make_samples([toy.COMPLETION] * 4000, block_length=block_length)
    views = plans.random_step(samples, Key(4), num_views=1, tokens_per_step=tokens_per_step)
    covered_S = (views.weight_RS * views.is_target_RS).double().mean(0)[1:5]
    torch.testing.assert_close(covered_S, torch.ones(4, dtype=torch.float64), rtol=0, atol=0.12)
    num_targets_R = views.is_target_RS.sum(-1)
    assert int(num_targets_R.min()) >= 1
    if tokens_per_step > 1:
        return
    value_B = likelihood.per_sequence(toy.view_logp(views, samples.canvas), views.weight_RS, views.sample_R, 4000)
    expected = {None: -4.4783095268, 2: -4.4430287095}[block_length]
    assert abs(float(value_B.mean()) - expected) < 4 * float(value_B.std()) / 4000**0.5


@given(
    score=st.floats(-50, 50),
    beta=st.floats(0.01, 5),
    smoothing=st.floats(0.0, 0.49),
)
@settings(deadline=None)
def test_pair_losses(score: float, beta: float, smoothing: float) -> None:
    score_1 = torch.tensor([score], dtype=torch.float64)
    logistic = float(pair_loss("logistic", score_1, beta, smoothing))
    smooth = math.log1p(math.exp(-abs(beta * score))) + max(-beta * score, 0.0)
    assert logistic == pytest.approx(smooth + smoothing * beta * score, rel=1e-9, abs=1e-9)
    assert float(pair_loss("squared", score_1, beta)) == pytest.approx((score - 0.5 / beta) ** 2)
    assert float(pair_loss("hinge", score_1, beta)) == pytest.approx(max(0.0, 1 - beta * score))


@given(margin=st.floats(-30, 30), baseline=st.floats(-5, 5), beta=st.floats(0.01, 2))
@settings(deadline=None)
def test_kto_is_symmetric_in_good_and_bad(margin: float, baseline: float, beta: float) -> None:
    margin_2 = torch.tensor([margin, 2 * baseline - margin], dtype=torch.float64)
    baseline_0 = torch.tensor(baseline, dtype=torch.float64)
    good, bad = kto_loss(margin_2, torch.tensor([True, False]), baseline_0, beta, 1.0, 1.0)
    assert float(good) == pytest.approx(float(bad), abs=1e-9)
    sigma = 1 / (1 + math.exp(-beta * (margin - baseline)))
    assert float(good) == pytest.approx(1 - sigma, abs=1e-9)


def test_groups_that_are_no_pairs_are_refused() -> None:
    samples = samples_of((0, 1, 2))
    with pytest.raises(ValueError, match="one chosen and one rejected"):
        pair_rows(samples)
    with pytest.raises(ValueError, match="which completions are preferred"):
        pair_rows(toy.make_samples())
    views = PAIRS["dpo"].corrupt(samples, Key(0))
    with pytest.raises(ValueError, match="reference policy"):
        PAIRS["dpo"].loss(torch.zeros(views.noisy_RS.shape), torch.zeros(()), None, views, samples)


@pytest.mark.parametrize(
    ("options", "bad", "message"),
    [
        (VRPOOptions, {"beta": 0.0}, "greater than 0"),
        (VRPOOptions, {"views_per_sample": 0}, "greater than or equal to 1"),
        (VRPOOptions, {"link": "hinge", "label_smoothing": 0.1}, "label_smoothing needs link: logistic"),
        (DPOOptions, {"label_smoothing": 0.5}, "less than 0.5"),
        (DTRPOOptions, {"plan": "bernoulli"}, "Extra inputs"),
        (KTOOptions, {"weight_bad": 0.0}, "greater than 0"),
    ],
)
def test_bad_options(options: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options.model_validate(bad)
