"""Experts on a GPU: the grouped matmul is taken where it can be, and equals the loop."""

from __future__ import annotations

import pytest
import torch

from dare.families.layers.moe import Experts, can_group, grouped_swiglu, looped_swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]


def test_grouped_equals_looped() -> None:
    """In value and gradient, with uneven groups and an expert without tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        module = Experts(8, 256, 384).bfloat16()
        for parameter in module.parameters():
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        x = torch.randn(301, 256, generator=generator).bfloat16().requires_grad_()
        upstream = torch.randn(301, 256, generator=generator).bfloat16()
        end_E = torch.tensor([7, 7, 50, 51, 123, 200, 299, 301])
    if not can_group(x, module.gate_proj):
        pytest.skip("this GPU has no grouped matmul")
    weights = (module.gate_proj, module.up_proj, module.down_proj)
    results = []
    for run in (grouped_swiglu, looped_swiglu):
        y = run(x, end_E, *weights)
        results.append((y, *torch.autograd.grad(y, [x, *weights], upstream)))
    for got, expected in zip(*results, strict=True):
        assert (got.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


def test_float32_takes_the_loop() -> None:
    x = torch.zeros(4, 16, device="cuda")
    assert not can_group(x, torch.zeros(2, 16, 16, device="cuda"))
