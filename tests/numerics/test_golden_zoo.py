"""The other algorithms of the stored set: advantages, views, losses, gradients, log-probs of the authors' code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.algorithms.bgpo import BGPO, BGPOOptions
from dare.algorithms.ebpo import EBPO, EBPOOptions
from dare.algorithms.justgrpo import JustGRPO, JustGRPOOptions
from dare.algorithms.spg import SPG, SPGOptions
from dare.algorithms.tracerl import TraceRL, TraceRLOptions
from dare.algorithms.wd1 import WD1, WD1Options
from dare.core.rng import Key
from dare.core.types import Canvas, Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.families.weights import load_family
from dare.objectives.advantage import compute_advantages, group_softmax

GOLDEN = Path(__file__).parent.parent / "golden"
MASK = 126


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "rl" / f"{name}.json").read_text()), load_file(GOLDEN / "rl" / f"{name}.safetensors")


@functools.cache
def golden_family(name: str) -> Any:
    return load_family(GOLDEN / name, torch.float32, "cpu")


class Case:
    """One stored case and our samples for it. `attention_mask`, where stored, hides padding; else it is attended."""

    def __init__(self, algorithm: str, name: str) -> None:
        facts, tensors = load(algorithm)
        self.facts: dict[str, Any] = facts[name]
        self.tensors = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}

    def build(
        self, prompt_BP: Tensor, completion_BL: Tensor, is_scored_BL: Tensor, is_real_BS: Tensor, step_map: Any = None
    ) -> Samples:
        input_BS = torch.cat([prompt_BP, completion_BL], dim=1)
        self.num_prompt = prompt_BP.shape[1]
        is_completion_BS = torch.zeros_like(input_BS, dtype=torch.bool)
        is_completion_BS[:, self.num_prompt :] = True
        block_length = self.facts.get("block_size") or self.facts.get("block_length")
        is_blockwise = self.facts["model"] == "sdar"
        block_BS = is_completion_BS.long() - 1
        if block_length:
            column_S = torch.arange(input_BS.shape[1]) - self.num_prompt
            block_BS = torch.div(column_S, block_length, rounding_mode="floor").clamp(min=-1).expand_as(input_BS)
            position_BS = (is_real_BS.long().cumsum(-1) - 1).clamp(min=0)
            if self.facts.get("block_origin") == "global":
                block_BS = position_BS // block_length
            elif self.facts.get("block_origin") == "response":  # prompt blocks from the left, then the completion's own
                num_B1 = -(-is_real_BS[:, : self.num_prompt].sum(-1, keepdim=True) // block_length)
                block_BS = torch.where(is_completion_BS, num_B1 + column_S // block_length, position_BS // block_length)
            elif is_blockwise:  # prompt blocks end where the completion begins
                block_BS = torch.div(column_S, block_length, rounding_mode="floor").expand_as(input_BS) + 2
        group_size = self.facts["group_size"]
        self.samples = Samples(
            canvas=Canvas(
                input_BS, is_completion_BS, is_real_BS, block_BS.clone(), "block_causal" if is_blockwise else "full"
            ),
            is_scored_BS=self.on_canvas(is_scored_BL.bool()),
            sample_id_B=torch.arange(len(input_BS)),
            advantage_B=self.tensors.get("advantages", torch.zeros(len(input_BS))),
            group_B=torch.arange(len(input_BS)) // (group_size or 1),
            mask_id=MASK,
            step_map_BS=None if step_map is None else self.on_canvas(step_map, fill=-1),
        )
        return self.samples

    def usual(self, is_real_BS: Tensor | None = None) -> Samples:
        prompt_BP, completion_BL = self.tensors["prompt_ids"], self.tensors["completion_ids"]
        width = prompt_BP.shape[1] + completion_BL.shape[1]
        is_real_BS = torch.ones(len(prompt_BP), width, dtype=torch.bool) if is_real_BS is None else is_real_BS
        is_scored_BL = self.tensors.get("completion_mask", is_real_BS[:, prompt_BP.shape[1] :])
        return self.build(prompt_BP, completion_BL, is_scored_BL, is_real_BS)

    def on_canvas(self, value: Tensor, fill: float = 0) -> Tensor:
        """Completion columns widened to the canvas."""
        return torch.nn.functional.pad(value, (self.num_prompt, 0), value=fill)

    def views(self, is_masked_BMS: Tensor, is_target_BS: Tensor, weight_BMS: Tensor | None = None) -> Views:
        is_noise_BMS = is_masked_BMS & ~self.samples.canvas.is_completion_BS[:, None]
        weight_BMS = torch.ones(is_masked_BMS.shape) if weight_BMS is None else weight_BMS
        is_target_BMS = is_masked_BMS & is_target_BS[:, None]
        return corrupt.assemble(self.samples, is_masked_BMS, is_target_BMS, weight_BMS, is_noise_BMS=is_noise_BMS)

    def check_advantages(self, rule: str) -> None:
        advantage_B = compute_advantages(rule, self.tensors["rewards"], self.samples.group_B)
        torch.testing.assert_close(advantage_B, self.tensors["advantages"], rtol=0, atol=1e-5)

    def check_loss(self, loss: Loss, *, tolerance: float = 1e-5) -> None:
        expected = self.tensors["loss"].double()
        torch.testing.assert_close(loss.value.detach(), expected, rtol=tolerance, atol=max(5e-6, tolerance / 10))

    def check_log_probs(self, views: Views, expected_RS: Tensor, temperature: float = 1.0) -> None:
        views.temperature = temperature
        with torch.no_grad():
            got_RS = golden_family(self.facts["model"]).view_logp(views, self.samples.canvas.rows(views.sample_R))
        torch.testing.assert_close(got_RS, expected_RS * views.is_target_RS, rtol=0, atol=1e-4)


def check_gradient(loss: Loss, logp_RS: Tensor, expected: Tensor, tolerance: float = 5e-6) -> None:
    (got,) = torch.autograd.grad(loss.value, logp_RS)
    assert_gradient(got, expected, logp_RS.detach(), tolerance)


def assert_gradient(got: Tensor, expected: Tensor, logp: Tensor, tolerance: float = 5e-6) -> None:
    """Theirs is a projection of the logits' gradient on onehot - softmax, so its rounding grows as 1 / (1 - p)."""
    scale = float(expected.abs().max())
    assert scale > 0
    share = torch.where(logp == 0, 1.0, -torch.expm1(logp)).double()
    torch.testing.assert_close(got.double() * share, expected.double() * share, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["nsr_psr", "equal_rewards", "psr_only"])
def test_wd1(name: str) -> None:
    case = Case("wd1", name)
    samples = case.usual()
    case.check_advantages("mean")
    algorithm = WD1(WD1Options(variant="faithful", terms=case.facts["terms"]))
    whole_B = torch.zeros(6, dtype=torch.int64)
    for sign, weights in ((1, "weights_positive"), (-1, "weights_negative")):
        own_B = group_softmax(sign * samples.advantage_B, whole_B).float()
        torch.testing.assert_close(own_B, case.tensors[weights], rtol=0, atol=1e-6)
    views = case.views(case.tensors["view_mask"].bool().transpose(0, 1), samples.is_scored_BS)
    stored_RS = case.on_canvas(case.tensors["logp"])
    case.check_log_probs(views, stored_RS)
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    case.check_loss(loss)
    if name == "equal_rewards":
        assert float(torch.autograd.grad(loss.value, logp_RS)[0].abs().max()) == 0.0
    else:
        check_gradient(loss, logp_RS, case.on_canvas(case.tensors["grad_logp"]))


@pytest.mark.parametrize("name", ["mix", "eubo", "elbo", "zero", "mix_random"])
def test_spg(name: str) -> None:
    case = Case("spg", name)
    facts = case.facts
    is_real_BS = torch.cat([case.tensors["prompt_mask"].bool(), torch.ones(6, 16, dtype=torch.bool)], dim=1)
    samples = case.usual(is_real_BS)
    case.check_advantages("mean")
    options = {"negative": facts["estimator"], "power": facts["eubo_beta"], "mix_weight": facts["mix_weight"]}
    algorithm = SPG(SPGOptions.model_validate({**options, "num_views": facts["num_t"], "variant": "faithful"}))
    views = case.views(case.tensors["view_mask"].bool(), samples.is_scored_BS)
    stored_RS = case.on_canvas(case.tensors["view_logp"].flatten(0, 1))
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS, None, views, samples)
    case.check_loss(loss)
    check_gradient(loss, logp_RS, case.on_canvas(case.tensors["grad_view_logp"].flatten(0, 1)))


@pytest.mark.parametrize("name", ["basic", "zero_advantage_group", "temperature"])
def test_justgrpo(name: str) -> None:
    case = Case("justgrpo", name)
    samples = case.usual()
    samples.group_B = torch.arange(6) % 2  # member-major rows
    case.check_advantages("std4")
    algorithm = JustGRPO(JustGRPOOptions(eps=case.facts["epsilon"], variant="faithful"))
    views = algorithm.corrupt(samples, Key(0))
    stored_RS = case.tensors["view_mask"].bool().transpose(0, 1).flatten(0, 1)
    assert torch.equal(views.noisy_RS == MASK, stored_RS)
    logp_BS = case.on_canvas(case.tensors["logp"])
    case.check_log_probs(views, logp_BS[views.sample_R], case.facts["temperature"])
    logp_RS = (logp_BS[views.sample_R] * views.is_target_RS).requires_grad_()
    loss = algorithm.loss(logp_RS, logp_RS.detach(), None, views, samples)
    num_valid = int((samples.advantage_B != 0).sum())
    scale = (num_valid + 1e-5) / (case.facts["valid_samples"] + 1e-5)  # theirs is a mean over ranks
    torch.testing.assert_close(loss.value.detach() * scale, case.tensors["loss"].double(), rtol=1e-5, atol=5e-6)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    grad_BS = torch.zeros_like(logp_BS).index_add(0, views.sample_R, grad_RS) * scale
    expected_BS = case.on_canvas(case.tensors["grad_logp"])
    assert_gradient(grad_BS, expected_BS, logp_BS)
    slot_S = (-samples.advantage_B[:, None] * samples.canvas.is_completion_BS).sum(0)[case.num_prompt :]
    slot_S = slot_S * scale / (16 * (num_valid + 1e-5))
    torch.testing.assert_close(slot_S, case.tensors["slot_losses"], rtol=1e-5, atol=5e-6)


BLOCK_CASES = ["block_onpolicy", "block_clip_kl", "block_kl_k1", "block_coupled_masks"]
FULL_CASES = ["full_onpolicy", "full_clip_kl", "full_random_masking", "full_coupled_masks"]


def tracerl_case(name: str) -> tuple[Case, Views, TraceRL]:
    """Their rows as views: trained tokens are the targets, a row's own mask its noisy stream."""
    case = Case("tracerl", name)
    facts, tensors = case.facts, case.tensors
    width, num_prompt = facts["response_width"], facts["prompt_width"]
    input_BS = tensors["input_ids"]
    is_real_BS = torch.ones_like(input_BS, dtype=torch.bool)
    if facts["model"] == "sdar":
        is_real_BS[:, :num_prompt] = input_BS[:, :num_prompt] != facts["pad_id"]
    is_answer_BL = input_BS[:, num_prompt:] != facts["pad_id"]
    row_R = tensors["row_sample"]
    advantage_B = torch.zeros(len(input_BS))
    advantage_B[row_R] = tensors["advantages"]
    tensors["advantages"] = advantage_B
    case.build(input_BS[:, :num_prompt], input_BS[:, num_prompt:], is_answer_BL, is_real_BS, tensors["step_map"])
    if facts["model"] == "sdar":
        noisy_RS = torch.cat([input_BS[row_R, :num_prompt], tensors["extended_input_ids"][:, -width:]], dim=1)
    else:
        noisy_RS = tensors["input_ids_noisy"]
    is_target_RS = tensors["target_mask"].bool()
    view_R = (row_R[:, None] == row_R[None]).tril().sum(-1) - 1
    clean_RS = input_BS[row_R]
    views = Views(noisy_RS, clean_RS, clean_RS, is_target_RS, is_target_RS.float(), row_R, view_R)
    options = {"eps": facts["epsilon"], "beta": facts["beta"], "kl": facts["kl"], "shrink": facts["shrink"]}
    return case, views, TraceRL(TraceRLOptions.model_validate({**options, "variant": "faithful"}))


@pytest.mark.parametrize("name", BLOCK_CASES + FULL_CASES)
def test_tracerl(name: str) -> None:
    case, views, algorithm = tracerl_case(name)
    is_target_RS = views.is_target_RS
    logp_RS = (case.tensors["logp"] * is_target_RS).requires_grad_()
    loss = algorithm.loss(logp_RS, case.tensors["logp_old"] * is_target_RS, None, views, case.samples)
    case.check_loss(loss)
    check_gradient(loss, logp_RS, case.tensors["grad_logp"])


@pytest.mark.parametrize("name", BLOCK_CASES + FULL_CASES)
def test_tracerl_log_probs_of_the_checkpoint(name: str) -> None:
    case, views, _ = tracerl_case(name)
    case.check_log_probs(views, case.tensors["logp"])


@pytest.mark.parametrize("name", ["block_onpolicy", "block_clip_kl", "full_onpolicy"])
def test_tracerl_views_are_theirs(name: str) -> None:
    """Rows in their order: the same targets and the same noisy streams from the stored step map."""
    case, theirs, algorithm = tracerl_case(name)
    own = algorithm.corrupt(case.samples, Key(0))
    assert torch.equal(own.sample_R, theirs.sample_R)
    assert torch.equal(own.is_target_RS, theirs.is_target_RS)
    seen = own.is_target_RS.any(-1)
    assert bool(seen.all())
    assert torch.equal(own.noisy_RS, theirs.noisy_RS)


def elbo_case(algorithm: str, name: str) -> tuple[Case, Views]:
    """Stored [sample, draw, slot] masks as views with weight 1 / p / draws; what they removed is padding."""
    case = Case(algorithm, name)
    case.usual(case.tensors["attention_mask"].bool())
    is_masked_BMS = case.on_canvas(case.tensors["view_mask"].bool())
    p_BML = case.tensors["p_mask"]
    p_BML = p_BML[:, :, None].expand(case.tensors["view_mask"].shape) if p_BML.dim() == 2 else p_BML
    weight_BMS = case.on_canvas(torch.where(p_BML > 0, 1 / p_BML.clamp(min=1e-9), 0.0)) / case.facts["mc_num"]
    return case, case.views(is_masked_BMS, case.samples.is_scored_BS, weight_BMS)


def split(case: Case, views: Views, values: list[Tensor]) -> list[tuple[Samples, Views, list[Tensor]]]:
    """Their micro-batches, whose losses they average."""
    size, samples, parts = case.facts["micro_batch"], case.samples, []
    for start in range(0, 6, size):
        rows = slice(start, start + size)
        is_here_R = (views.sample_R >= start) & (views.sample_R < start + size)
        chosen = views.rows(is_here_R)
        chosen.sample_R = chosen.sample_R - start
        part = Samples(
            canvas=samples.canvas.rows(rows),
            is_scored_BS=samples.is_scored_BS[rows],
            sample_id_B=samples.sample_id_B[rows],
            advantage_B=samples.advantage_B[rows],
            group_B=samples.group_B[rows],
            mask_id=MASK,
        )
        parts.append((part, chosen, [value[is_here_R] for value in values]))
    return parts


def averaged(case: Case, algorithm: Any, views: Views, logp_RS: Tensor, old_RS: Tensor, reference_RS: Any) -> Loss:
    values = [logp_RS, old_RS, *([] if reference_RS is None else [reference_RS])]
    losses = []
    for part, chosen, (new, old, *rest) in split(case, views, values):
        losses.append(algorithm.loss(new, old, rest[0] if rest else None, chosen, part).value)
    return Loss(torch.stack(losses).mean())


BGPO_CASES = [
    *(("bgpo", name) for name in ("onpolicy", "offpolicy_clip", "micro_batches", "seq_mean_agg", "dual_clip")),
    *(("bgpo_block", name) for name in ("onpolicy", "offpolicy_clip", "micro_batches")),
]


@pytest.mark.parametrize(("algorithm_name", "name"), BGPO_CASES)
def test_bgpo(algorithm_name: str, name: str) -> None:
    case, views = elbo_case(algorithm_name, name)
    facts = case.facts
    case.check_advantages("std6")
    norm = "token" if facts["loss_agg_mode"] == "token-mean" else "sequence"
    options = {"eps": facts["clip"], "dual_clip": facts["dual_clip"], "num_mc": facts["mc_num"], "norm": norm}
    algorithm = BGPO(BGPOOptions.model_validate({**options, "variant": "faithful"}))
    stored_RS = case.on_canvas(case.tensors["view_logp"].flatten(0, 1))
    case.check_log_probs(views, stored_RS)
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    elbo_R = likelihood.per_view(logp_RS.detach(), views.weight_RS) * facts["mc_num"]
    torch.testing.assert_close(elbo_R.float(), case.tensors["view_elbo"].flatten(), rtol=1e-5, atol=1e-4)
    old_RS = spread(views, case.tensors["view_elbo_old"].flatten() / facts["mc_num"], None)
    loss = averaged(case, algorithm, views, logp_RS, old_RS, None)
    case.check_loss(loss)
    check_gradient(loss, logp_RS, case.on_canvas(case.tensors["grad_view_logp"].flatten(0, 1)))


def spread(views: Views, value: Tensor, num_samples: int | None) -> Tensor:
    """float64 [R, S]: constant log-probs whose weighted sum per view (or per sample) is `value`."""
    one_RS = views.is_target_RS.double()
    if num_samples is None:
        total_R, value_R = likelihood.per_view(one_RS, views.weight_RS), value.double()
    else:
        total_R = likelihood.per_sequence(one_RS, views.weight_RS, views.sample_R, num_samples)[views.sample_R]
        value_R = value.double()[views.sample_R]
    return one_RS * (value_R / total_R.clamp(min=1e-12))[:, None]


@pytest.mark.parametrize("name", ["onpolicy", "offpolicy_clip", "offpolicy_kl", "micro_batches_kl"])
def test_ebpo(name: str) -> None:
    case, views = elbo_case("ebpo", name)
    facts = case.facts
    case.check_advantages("std6")
    options = {"eps": facts["clip"], "beta": facts["beta"], "kl": facts["kl"], "num_mc": facts["mc_num"]}
    algorithm = EBPO(EBPOOptions.model_validate(options))
    stored_RS = case.on_canvas(case.tensors["view_logp"].flatten(0, 1))
    case.check_log_probs(views, stored_RS)
    logp_RS = (stored_RS * views.is_target_RS).requires_grad_()
    elbo_B = likelihood.per_sequence(logp_RS.detach(), views.weight_RS, views.sample_R, 6)
    torch.testing.assert_close(elbo_B.float(), case.tensors["seq_logp"], rtol=1e-5, atol=1e-4)
    reference_RS = spread(views, case.tensors["seq_logp_ref"], 6) if algorithm.needs_reference else None
    old_RS = spread(views, case.tensors["seq_logp_old"], 6)
    loss = averaged(case, algorithm, views, logp_RS, old_RS, reference_RS)
    case.check_loss(loss, tolerance=5e-5)
    expected_RS = case.on_canvas(case.tensors["grad_view_logp"].flatten(0, 1))
    check_gradient(loss, logp_RS, expected_RS, tolerance=5e-5)
