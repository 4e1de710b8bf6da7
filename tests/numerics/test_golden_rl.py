"""Losses, advantages and gradients of the authors' public code, from its own views and log-probs.

Their views are rebuilt from the stored masks, their log-probs are fed to our losses, and where a checkpoint of a family
exists here the log-probs themselves are computed again. Tolerances are those of the stored set's description.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.algorithms.cj_grpo import CJGRPO, CJGRPOOptions
from dare.algorithms.coupled_grpo import CoupledGRPO, CoupledGRPOOptions
from dare.algorithms.d1 import D1, D1Options
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.policy import PolicyAlgorithm
from dare.core.rng import Key
from dare.core.types import Canvas, Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.diffusion.counts import rounded_counts
from dare.families.weights import load_family
from dare.objectives.advantage import compute_advantages

GOLDEN = Path(__file__).parent.parent / "golden"
MASK = 126
CASES = ("onpolicy", "offpolicy_clip", "offpolicy_kl")


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "rl" / f"{name}.json").read_text()), load_file(GOLDEN / "rl" / f"{name}.safetensors")


class Case:
    """One stored case with our samples for it; prompt padding counts as real, as it did there."""

    def __init__(self, algorithm: str, name: str) -> None:
        facts, tensors = load(algorithm)
        self.facts: dict[str, Any] = facts[name]
        self.tensors = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        rows = slice(*self.facts["rows"]) if "rows" in self.facts else slice(None)
        prompt_BP, completion_BL = self.tensors["prompt_ids"][rows], self.tensors["completion_ids"][rows]
        self.num_prompt = prompt_BP.shape[1]
        input_BS = torch.cat([prompt_BP, completion_BL], dim=1)
        is_completion_BS = torch.zeros_like(input_BS, dtype=torch.bool)
        is_completion_BS[:, self.num_prompt :] = True
        is_scored_BS = self.on_canvas(self.tensors["completion_mask"].bool())
        step_map = self.tensors.get("step_map")
        self.samples = Samples(
            canvas=Canvas(
                input_BS, is_completion_BS, torch.ones_like(is_completion_BS), is_completion_BS.long() - 1, "full"
            ),
            is_scored_BS=is_scored_BS,
            sample_id_B=torch.arange(len(input_BS)),
            advantage_B=self.tensors["advantages"],
            group_B=torch.arange(len(input_BS)) // self.facts["group_size"],
            mask_id=MASK,
            step_map_BS=None if step_map is None else self.on_canvas(step_map, fill=-1),
        )

    def on_canvas(self, value: Tensor, fill: float = 0) -> Tensor:
        """Completion columns widened to the canvas."""
        return torch.nn.functional.pad(value, (self.num_prompt, 0), value=fill)

    def views(self, is_masked_BMS: Tensor, weight_BM: Tensor, is_target_BS: Tensor) -> Views:
        is_noise_BMS = is_masked_BMS & ~self.samples.canvas.is_completion_BS[:, None]
        weight_BMS = weight_BM[:, :, None].expand(is_masked_BMS.shape)
        is_target_BMS = is_masked_BMS & is_target_BS[:, None]
        return corrupt.assemble(self.samples, is_masked_BMS, is_target_BMS, weight_BMS, is_noise_BMS=is_noise_BMS)

    def check_advantages(self, algorithm: PolicyAlgorithm[Any]) -> None:
        """Of the whole rollout, whose rewards are stored even where a case is a part of it."""
        reward_B = self.tensors["rewards"]
        advantage_B = algorithm.advantages(reward_B, torch.arange(len(reward_B)) // self.facts["group_size"])
        rows = slice(*self.facts["rows"]) if "rows" in self.facts else slice(None)
        torch.testing.assert_close(advantage_B[rows], self.tensors["advantages"], rtol=0, atol=1e-5)

    def check_loss(self, loss: Loss) -> None:
        expected = self.tensors["loss"].double()
        torch.testing.assert_close(loss.value.detach(), expected, rtol=1e-5, atol=5e-6)


def check_gradient(got: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * scale)


def options_of(case: Case) -> dict[str, Any]:
    return {"eps": case.facts["epsilon"], "beta": case.facts["beta"]}


@functools.cache
def golden_family() -> Any:
    return load_family(GOLDEN / "llada", torch.float32, "cpu")


def recompute(case: Case, views: Views) -> Tensor:
    """float32 [R, S] under the golden LLaDA checkpoint."""
    with torch.no_grad():
        result: Tensor = golden_family().view_logp(views, case.samples.canvas.rows(views.sample_R))
    return result


def d1_views(case: Case) -> Views:
    is_masked_BMS = case.tensors["view_mask"].bool().transpose(0, 1)
    return case.views(is_masked_BMS, torch.ones(is_masked_BMS.shape[:2]), case.samples.is_scored_BS)


@pytest.mark.parametrize("name", CASES)
def test_d1(name: str) -> None:
    case = Case("d1", name)
    algorithm = D1(D1Options(**options_of(case)))
    case.check_advantages(algorithm)
    views = d1_views(case)
    logp_RS, old_RS = case.on_canvas(case.tensors["logp"]).requires_grad_(), case.on_canvas(case.tensors["logp_old"])
    reference_RS = case.on_canvas(case.tensors["logp_ref"]) if algorithm.needs_reference else None
    loss = algorithm.loss(logp_RS, old_RS, reference_RS, views, case.samples)
    case.check_loss(loss)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    check_gradient(grad_RS, case.on_canvas(case.tensors["grad_logp"]))
    # Their own metric counts the ratios outside the interval whose clip does not bind, ours those whose clip does.
    binding = case.facts["clip_fraction"] - case.facts["reported"]["clip_ratio"]
    assert loss.metrics["clip_fraction"].mean == pytest.approx(binding, abs=1e-6)
    if reference_RS is not None:
        assert loss.metrics["kl"].mean == pytest.approx(case.facts["reported"]["kl"], rel=1e-5)


def test_d1_views_are_masked_like_theirs() -> None:
    """Our own plan agrees with the stored views wherever they are not random."""
    case = Case("d1", "onpolicy")
    own, theirs = corrupt.all_masked(case.samples, Key(0), prompt_noise=0.15), d1_views(case)
    columns = slice(case.num_prompt, None)
    for field in ("noisy_RS", "context_RS", "target_RS", "is_target_RS", "weight_RS"):
        assert torch.equal(getattr(own, field)[:, columns], getattr(theirs, field)[:, columns]), field
    assert torch.equal(own.is_target_RS, theirs.is_target_RS)


@pytest.mark.parametrize("name", CASES)
def test_coupled_grpo(name: str) -> None:
    case = Case("coupled_grpo", name)
    algorithm = CoupledGRPO(CoupledGRPOOptions(**options_of(case), variant="faithful"))
    case.check_advantages(algorithm)
    is_masked_BMS = case.tensors["view_mask"].bool().transpose(0, 1)
    weight_M = torch.tensor(case.facts["view_weights"]) / 2
    views = case.views(is_masked_BMS, weight_M.expand(len(is_masked_BMS), -1), case.samples.is_scored_BS)
    stored_RS = case.on_canvas(case.tensors["view_logp"].transpose(0, 1).flatten(0, 1))
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    num = case.samples.canvas.batch_size
    token_BS = likelihood.per_token(logp_RS.detach(), views.weight_RS, views.sample_R, num)
    is_scored_BS = case.samples.is_scored_BS
    expected_BS = case.on_canvas(case.tensors["logp"]).double()
    torch.testing.assert_close(token_BS[is_scored_BS], expected_BS[is_scored_BS], rtol=1e-6, atol=1e-4)

    loss = algorithm.loss(
        logp_RS, first_view(case, "logp_old"), first_view(case, "logp_ref", algorithm), views, case.samples
    )
    case.check_loss(loss)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    expected_RS = case.on_canvas(case.tensors["grad_view_logp"].transpose(0, 1).flatten(0, 1))
    check_gradient(grad_RS, expected_RS)


def first_view(case: Case, name: str, algorithm: PolicyAlgorithm[Any] | None = None) -> Any:
    """Token log-probs stored only as weighted sums: put into the full view, whose weight is one half."""
    if algorithm is not None and not algorithm.needs_reference:
        return None
    token_BS = case.on_canvas(case.tensors[name]).double() * 2
    zero_BS = torch.zeros_like(token_BS)
    return torch.stack([token_BS, zero_BS, zero_BS], dim=1).flatten(0, 1)


def espo_views(case: Case) -> Views:
    """[sample, draw, half] from the stored [draw, half, sample]; weights from the stored counts."""
    is_masked_BMS = case.tensors["view_mask"].bool().flatten(0, 1).transpose(0, 1)
    count_BM = case.tensors["masked_counts"].flatten(0, 1).transpose(0, 1)
    length = case.tensors["completion_ids"].shape[1]
    weight_BM = (length + 1) / count_BM.clamp(min=1) / 2 / case.facts["num_mc"]
    return case.views(is_masked_BMS, weight_BM, case.samples.canvas.is_completion_BS)


@pytest.mark.parametrize("name", [*CASES, "accum2_kl", "shifted"])
def test_espo(name: str) -> None:
    case = Case("espo", name)
    algorithm = ESPO(ESPOOptions(**options_of(case), num_mc=case.facts["num_mc"]))
    case.check_advantages(algorithm)
    views, num = espo_views(case), case.samples.canvas.batch_size
    stored_RS = case.on_canvas(case.tensors["view_logp"].flatten(0, 1).transpose(0, 1).flatten(0, 1))
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    sequence_B = likelihood.per_sequence(logp_RS.detach(), views.weight_RS, views.sample_R, num)
    torch.testing.assert_close(sequence_B, case.tensors["seq_logp"].double(), rtol=1e-6, atol=1e-4)

    reference_RS = spread(case, views, "seq_logp_ref") if algorithm.needs_reference else None
    loss = algorithm.loss(logp_RS, spread(case, views, "seq_logp_old"), reference_RS, views, case.samples)
    case.check_loss(loss)
    ratio_B = torch.tensor(case.facts["ratio"]).double()
    assert loss.metrics["ratio"].mean == pytest.approx(float(ratio_B.mean()), rel=1e-5)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    expected_RS = case.on_canvas(case.tensors["grad_view_logp"].flatten(0, 1).transpose(0, 1).flatten(0, 1))
    check_gradient(grad_RS, expected_RS)


def spread(case: Case, views: Views, name: str) -> Tensor:
    """float64 [R, S]: log-probs whose weighted sum over a sample's views is its stored sequence log-likelihood."""
    num = case.samples.canvas.batch_size
    one_RS = views.is_target_RS.double()
    weight_B = likelihood.per_sequence(one_RS, views.weight_RS, views.sample_R, num)
    value_B = case.tensors[name].double() / weight_B
    return one_RS * value_B[views.sample_R, None]


@pytest.mark.parametrize("name", ["onpolicy_sampled", "offpolicy_clip", "offpolicy_kl"])
def test_cj_grpo(name: str) -> None:
    case = Case("cj_grpo", name)
    algorithm = CJGRPO(CJGRPOOptions(**options_of(case), variant="faithful"))
    case.check_advantages(algorithm)
    views = algorithm.corrupt(case.samples, Key(0))
    assert int(views.view_R.max()) + 1 == case.facts["steps"]

    def by_view(value: str) -> Tensor:
        return case.on_canvas(case.tensors[value])[views.sample_R] * views.is_target_RS

    logp_RS = by_view("logp").requires_grad_()
    reference_RS = by_view("logp_ref") if algorithm.needs_reference else None
    loss = algorithm.loss(logp_RS, by_view("logp_old"), reference_RS, views, case.samples)
    case.check_loss(loss)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    assert not bool((grad_RS != 0)[~views.is_target_RS].any())
    zero_BS = torch.zeros(case.samples.canvas.input_BS.shape)
    grad_BS = zero_BS.index_add(0, views.sample_R, grad_RS)
    check_gradient(grad_BS, case.on_canvas(case.tensors["grad_logp"]))


@pytest.mark.parametrize("name", CASES)
def test_d1_log_probs_of_the_checkpoint(name: str) -> None:
    case = Case("d1", name)
    views = d1_views(case)
    logp_RS = recompute(case, views)
    is_scored_BS = case.samples.is_scored_BS
    expected_BS = case.on_canvas(case.tensors["logp"])
    torch.testing.assert_close(logp_RS[is_scored_BS], expected_BS[is_scored_BS], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*CASES, "accum2_kl"])
def test_espo_log_probs_of_the_checkpoint(name: str) -> None:
    case = Case("espo", name)
    views = espo_views(case)
    expected_RS = case.on_canvas(case.tensors["view_logp"].flatten(0, 1).transpose(0, 1).flatten(0, 1))
    got_RS = recompute(case, views)
    torch.testing.assert_close(got_RS, expected_RS * views.is_target_RS, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["onpolicy_sampled", "offpolicy_clip", "offpolicy_kl"])
def test_cj_grpo_log_probs_of_the_checkpoint(name: str) -> None:
    case = Case("cj_grpo", name)
    views = corrupt.trace_replay(case.samples, case.samples.canvas.is_completion_BS)
    got_RS = recompute(case, views)
    expected_RS = case.on_canvas(case.tensors["logp"])[views.sample_R] * views.is_target_RS
    torch.testing.assert_close(got_RS, expected_RS, rtol=0, atol=1e-4)


def test_their_rounded_counts_differ_from_ours() -> None:
    """Half-to-even rounding skips counts; with the same start ours never leaves a count out."""
    facts, tensors = load("espo")
    for name in (name for name in facts if name.startswith("mask_counts")):
        length, num = facts[name]["L"], facts[name]["b"]
        start = torch.arange(length + 1)[:, None]
        uniform = (start + 0.5) / (length + 1)
        own = corrupt.stratified_counts(uniform, torch.tensor(length), num, 0, torch.arange(num))
        assert all(len(own[:, view].unique()) == length + 1 for view in range(num))
        chosen = tensors[f"{name}/k0"]
        gap = (own[chosen] - tensors[f"{name}/counts"]) % (length + 1)
        assert bool(((gap == 0) | (gap == length)).all())  # theirs rounds to the nearest, ours down: equal or one less


@pytest.mark.parametrize(("algorithm", "lowest"), [("espo", 0), ("bgpo", 1)])
def test_rounded_counts_are_theirs(algorithm: str, lowest: int) -> None:
    """Every stored table, those in which float32 decides included."""
    facts, tensors = load(algorithm)
    names = [name for name in facts if name.startswith("mask_counts")]
    assert names
    for name in names:
        length, num = facts[name]["L"], facts[name].get("b", facts[name].get("n"))
        start = tensors[f"{name}/k0"][:, None]
        uniform = (start - lowest + 0.5) / (length + 1 - lowest)
        own = rounded_counts(uniform.double(), torch.tensor(length), num, lowest, torch.arange(num))
        assert torch.equal(own, tensors[f"{name}/counts"]), name


def test_golden_rewards_reach_every_advantage_rule() -> None:
    """The stored advantages tell the rules apart: a wrong rule does not pass."""
    case = Case("coupled_grpo", "onpolicy")
    group_B = torch.arange(6) // 3
    for rule in ("mean", "std4", "std6", "zpop"):
        other = compute_advantages(rule, case.tensors["rewards"], group_B)
        assert float((other - case.tensors["advantages"]).abs().max()) > 1e-2
