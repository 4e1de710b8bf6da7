"""Schedules, clipping, fp32 masters and accumulation, non-finite gradients, exact restore."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dare.core.errors import NonFiniteError
from dare.core.recipe import OptimizerRecipe
from dare.training.optim import Optimizer, learning_rate


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def _input(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_schedules_warm_up_and_end_where_they_should() -> None:
    cosine = OptimizerRecipe(lr=1.0, schedule="cosine", warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(cosine, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.1)
    linear = OptimizerRecipe(lr=2.0, schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert learning_rate(OptimizerRecipe(lr=3.0), 99, 10) == 3.0


def test_equals_torch_adamw_with_clipping() -> None:
    ours, theirs = _model(), _model()
    optimizer = Optimizer(ours.named_parameters(), OptimizerRecipe(lr=0.01, weight_decay=0.1, max_grad_norm=0.5), 10)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    plain = [p for p in theirs.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.99)
    )
    for seed in range(5):
        ours(_input(seed)).square().sum().backward()
        theirs(_input(seed)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        assert optimizer.step()["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_low_precision_parameters_accumulate_and_step_in_float32() -> None:
    model = _model(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), OptimizerRecipe(lr=1e-5), 10)
    start = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    for _ in range(3):
        for seed in range(4):
            model(_input(seed, torch.bfloat16)).square().sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
    moved = [float((optimizer.masters[name] - start[name]).abs().max()) for name in start]
    assert min(moved) == pytest.approx(3e-5, rel=0.2)  # far below one bf16 step at these magnitudes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    def run(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            model(_input(seed, dtype)).float().square().sum().backward()
            optimizer.step()

    recipe = OptimizerRecipe(lr=0.01, schedule="cosine")
    straight = _model(dtype)
    straight_optimizer = Optimizer(straight.named_parameters(), recipe, 8)
    run(straight, straight_optimizer, range(4))
    resumed = _model(dtype)
    resumed.load_state_dict(straight.state_dict())
    resumed_optimizer = Optimizer(resumed.named_parameters(), recipe, 8)
    resumed_optimizer.load_state({name: tensor.clone() for name, tensor in straight_optimizer.state().items()})
    run(straight, straight_optimizer, range(4, 8))
    run(resumed, resumed_optimizer, range(4, 8))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_bad_gradient_stops_before_any_weight_changes() -> None:
    model = _model()
    optimizer = Optimizer(model.named_parameters(), OptimizerRecipe(), 10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(_input(0)).sum().backward()
    model[2].weight.grad[0, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"parameter 2\.weight"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
