"""Two passes with one micro-batch's graph at a time give the gradient of the full graph, for every algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.algorithms.cj_grpo import CJGRPO, CJGRPOOptions
from dare.algorithms.coupled_grpo import CoupledGRPO, CoupledGRPOOptions
from dare.algorithms.d1 import D1, D1Options
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.sft import SFT, SFTOptions
from dare.core.rng import Key
from dare.core.types import Samples, Views
from tests.numerics import toy

ALGORITHMS: dict[str, Algorithm[Any]] = {
    "sft": SFT(SFTOptions(views_per_sample=2)),
    "d1": D1(D1Options()),
    "coupled_grpo": CoupledGRPO(CoupledGRPOOptions(beta=0.2)),
    "espo": ESPO(ESPOOptions(beta=0.3)),
    "espo_tight_clip": ESPO(ESPOOptions(eps=4e-4, beta=0.0)),
    "cj_grpo": CJGRPO(CJGRPOOptions(eps=0.05)),
    "cj_grpo_faithful": CJGRPO(CJGRPOOptions(variant="faithful")),
}


def samples_of(block_length: int | None) -> Samples:
    return toy.make_samples(
        [[0, 2, 1, 0], [1, 1, 2], [2, 0, 0, 1, 2]],
        prompts=[[2], [0, 1], [1]],
        scored_lengths=[4, 2, 3],
        step_maps=[[1, 0, 2, 1], [0, 1, 1], [2, 1, 0, 0, 3]],
        advantages=[1.0, -0.5, 0.75],
        block_length=block_length,
    )


def loss_of(algorithm: Algorithm[Any], logp_RS: Tensor, views: Views, samples: Samples) -> Tensor:
    old_RS = toy.view_logp(views, samples.canvas, toy.OLD)
    reference_RS = toy.view_logp(views, samples.canvas, toy.REFERENCE)
    return algorithm.loss(logp_RS, old_RS, reference_RS, views, samples).value


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("block_length", [None, 2])
def test_replay_equals_the_full_graph(name: str, block_length: int | None) -> None:
    algorithm, samples = ALGORITHMS[name], samples_of(block_length)
    views = algorithm.corrupt(samples, Key(4))
    theta = torch.tensor(toy.NEW, dtype=torch.float64, requires_grad=True)
    logp_RS = toy.view_logp(views, samples.canvas, theta)
    (expected,) = torch.autograd.grad(loss_of(algorithm, logp_RS, views, samples), theta)
    assert float(expected) != 0.0

    leaf = logp_RS.detach().requires_grad_()
    (grad_RS,) = torch.autograd.grad(loss_of(algorithm, leaf, views, samples), leaf)
    for size in (1, 2, views.num_views):
        total = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(views.num_views).split(size):
            chosen = views.rows(part)
            replayed = (grad_RS[part] * toy.view_logp(chosen, samples.canvas, theta)).sum()
            total += torch.autograd.grad(replayed, theta)[0]
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_linear_loss_needs_no_first_pass() -> None:
    algorithm, samples = ALGORITHMS["sft"], samples_of(None)
    assert algorithm.is_linear
    views = algorithm.corrupt(samples, Key(1))
    grads = []
    for start in (torch.zeros(views.noisy_RS.shape), toy.view_logp(views, samples.canvas).float()):
        leaf = start.requires_grad_()
        grads.append(torch.autograd.grad(algorithm.loss(leaf, leaf.detach(), None, views, samples).value, leaf)[0])
    assert torch.equal(grads[0], grads[1])
    assert not any(a.is_linear for name, a in ALGORITHMS.items() if name != "sft")
