"""SFT losses of public training code from its own masks, and its schedules."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.algorithms.sft import SFT, SFTOptions
from dare.core.types import Canvas, Samples, Views
from dare.diffusion import corrupt
from dare.diffusion.schedule import find_schedule, spread_time
from dare.families.weights import load_family

GOLDEN = Path(__file__).parent.parent / "golden"


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "sft" / f"{name}.json").read_text()), load_file(GOLDEN / "sft" / f"{name}.safetensors")


class Case:
    """One stored loss with our samples and views for it."""

    def __init__(self, name: str) -> None:
        facts, tensors = load("llada_sft")
        self.facts: dict[str, Any] = facts[name]
        self.tensors = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        input_BS = self.tensors["input_ids"]
        self.is_scored_BS = self._scored(input_BS)
        is_real_BS = torch.ones_like(self.is_scored_BS)
        self.samples = Samples(
            canvas=Canvas(input_BS, self.is_scored_BS, is_real_BS, torch.zeros_like(input_BS), "full"),
            is_scored_BS=self.is_scored_BS,
            sample_id_B=torch.arange(len(input_BS)),
            advantage_B=torch.zeros(len(input_BS)),
            group_B=torch.arange(len(input_BS)),
            mask_id=self.facts["mask_id"],
        )
        self.views = self._views()

    def _scored(self, input_BS: Tensor) -> Tensor:
        if "loss_mask" in self.tensors:
            return self.tensors["loss_mask"].bool()
        is_whole_scored = self.facts.get("denominator") == input_BS.numel()
        if "prompt_lengths" in self.tensors and not is_whole_scored:
            return torch.arange(input_BS.shape[1]) >= self.tensors["prompt_lengths"][:, None]
        return torch.ones_like(input_BS, dtype=torch.bool)

    def _views(self) -> Views:
        """The stored t is the mask probability itself, one per row."""
        is_masked_BMS = self.tensors["masked"][:, None]
        p_B1 = self.tensors["p_mask"][:, :1] if "p_mask" in self.tensors else self.tensors["t"][:, None]
        weight_BMS = find_schedule("linear").loss_weight(p_B1)[:, :, None].expand(is_masked_BMS.shape)
        return corrupt.assemble(self.samples, is_masked_BMS, is_masked_BMS, weight_BMS)

    def loss(self, norm: Literal["sequence", "token", "batch"], logp_RS: Tensor) -> Tensor:
        return SFT(SFTOptions(norm=norm)).loss(logp_RS, logp_RS, None, self.views, self.samples).value


CASES: list[tuple[str, Literal["sequence", "token"]]] = [
    ("d1", "token"),
    ("d1_no_prompt", "token"),
    ("d1_fixed_t", "token"),
    ("guidelines_pretrain", "token"),
    ("guidelines_sft", "sequence"),
    ("nemo_mdlm", "token"),
]


def expected_loss(case: Case) -> Tensor:
    return torch.tensor(case.facts["loss"] if "loss" in case.facts else case.facts["losses"]["mdlm"]).double()


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_loss_from_stored_token_losses(name: str, norm: Literal["sequence", "token"]) -> None:
    case = Case(name)
    if "noisy_ids" in case.tensors:
        assert torch.equal(case.views.noisy_RS, case.tensors["noisy_ids"])
    logp_RS = -case.tensors["token_ce"] * case.views.is_target_RS
    torch.testing.assert_close(case.loss(norm, logp_RS), expected_loss(case), rtol=5e-5, atol=0)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_loss_and_gradients_from_the_checkpoint(name: str, norm: Literal["sequence", "token"]) -> None:
    case = Case(name)
    family = load_family(GOLDEN / "llada", torch.float32, "cpu")
    logp_RS = family.view_logp(case.views, case.samples.canvas.rows(case.views.sample_R))
    expected_RS = -case.tensors["token_ce"] * case.views.is_target_RS
    torch.testing.assert_close(logp_RS.detach(), expected_RS, rtol=0, atol=1e-4)
    loss = case.loss(norm, logp_RS)
    torch.testing.assert_close(loss.detach(), expected_loss(case), rtol=5e-5, atol=0)
    if "loss" not in case.facts:
        return  # gradients of several losses are stored together there
    loss.backward()
    norms = {key: float(p.grad.norm()) for key, p in family.network.named_parameters() if p.grad is not None}
    expected = case.facts["grad_norms"]
    assert norms.keys() == expected.keys()
    for parameter, value in expected.items():
        assert norms[parameter] == pytest.approx(value, rel=5e-4), parameter


def test_norms_differ_where_samples_have_unequal_lengths() -> None:
    case = Case("guidelines_sft")
    logp_RS = -case.tensors["token_ce"] * case.views.is_target_RS
    assert abs(float(case.loss("token", logp_RS) - expected_loss(case))) > 0.05


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules(name: str) -> None:
    """Mask probability, and the weight once their 1e-6 in the denominator is taken out."""
    _, tensors = load("schedules")
    t = tensors[f"alpha_{name}/t"].double()
    schedule = find_schedule(name)
    share = schedule.mask_probability(t)
    torch.testing.assert_close(share, tensors[f"alpha_{name}/move_chance"].double(), rtol=0, atol=1e-6)
    slope = -tensors[f"alpha_{name}/alpha_derivative"].double()
    torch.testing.assert_close(schedule.loss_weight(t) * share, slope, rtol=1e-5, atol=1e-6)
    stored = tensors[f"alpha_{name}/weight"].double()
    torch.testing.assert_close(schedule.loss_weight(t) * share / (share + 1e-6), stored, rtol=2e-4, atol=1e-6)


def test_log_linear_noise_is_the_linear_schedule() -> None:
    _, tensors = load("schedules")
    t = tensors["noise_loglinear/t"].double()
    schedule = find_schedule("linear")
    scaling, chance = (tensors[f"noise_loglinear/{name}"].double() for name in ("loss_scaling", "move_chance"))
    torch.testing.assert_close(-schedule.loss_weight(t), scaling, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.mask_probability(t), chance, rtol=1e-6, atol=1e-7)


def test_uniform_corruption_from_stored_draws() -> None:
    """The same law: t uniform, p = (1 - eps) t + eps, masked where the draw is below p."""
    facts, tensors = load("corruption")
    t_B1 = spread_time(tensors["uniform/draw0"][:, None].double(), 1e-3)
    torch.testing.assert_close(t_B1.expand(4, 14), tensors["uniform/p_mask"].double(), rtol=0, atol=1e-6)
    is_masked_BS = (tensors["uniform/draw1"] < t_B1) & tensors["uniform/loss_mask"].bool()
    assert torch.equal(is_masked_BS, tensors["uniform/masked"])
    noisy_BS = torch.where(is_masked_BS, facts["uniform"]["mask_id"], tensors["uniform/input_ids"])
    assert torch.equal(noisy_BS, tensors["uniform/noisy_ids"])
