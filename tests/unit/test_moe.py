"""Experts and routers against plain references, and the way they are stored and counted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dare.families.layers.moe import (
    ExpertLoad,
    Experts,
    GroupedSigmoidRouter,
    Route,
    SoftmaxRouter,
    grouped_swiglu,
    looped_swiglu,
    recorded_routes,
)

WIDTH, EXPERT_SIZE = 16, 24  # rows of a grouped matmul are aligned in float32 and in bfloat16


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
    return module


def experts_of(num: int) -> Experts:
    module = filled(Experts(num, WIDTH, EXPERT_SIZE))
    assert isinstance(module, Experts)
    return module


def random_route(num_tokens: int, num_experts: int, per_token: int, seed: int) -> tuple[Tensor, Route]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    weight, expert = scores.topk(per_token)
    x = torch.randn(num_tokens, WIDTH, generator=generator)
    return x, Route(scores, expert, weight)


def dense(module: Experts, x_ND: Tensor, route: Route) -> Tensor:
    """Every token through every expert; what was not chosen counts zero."""
    weight_NE = torch.zeros_like(route.logits_NE).scatter(-1, route.expert_NA, route.weight_NA)
    total = torch.zeros_like(x_ND)
    for index in range(len(module.gate_proj)):
        hidden = functional.silu(x_ND @ module.gate_proj[index].T) * (x_ND @ module.up_proj[index].T)
        total = total + weight_NE[:, index, None] * (hidden @ module.down_proj[index].T)
    return total


# --- experts


@settings(max_examples=25, deadline=None)
@given(num_tokens=st.integers(1, 12), num_experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 99))
def test_sorted_tokens_equal_the_dense_reference(
    num_tokens: int, num_experts: int, data: st.DataObject, seed: int
) -> None:
    """In value and in all gradients, whatever share of the experts is used."""
    per_token = data.draw(st.integers(1, num_experts))
    module = experts_of(num_experts)
    x, route = random_route(num_tokens, num_experts, per_token, seed)
    x.requires_grad_()
    route.weight_NA.requires_grad_()
    inputs = [x, route.weight_NA, *module.parameters()]
    got, expected = module(x, route), dense(module, x, route)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0.0)
    upstream = torch.linspace(-1, 1, got.numel()).view_as(got)
    grads = torch.autograd.grad((got * upstream).sum(), inputs)
    for grad, reference in zip(grads, torch.autograd.grad((expected * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_grouped_equals_looped(dtype: torch.dtype, atol: float) -> None:
    """The grouped matmul that GPUs use runs on the CPU too; some experts have no token."""
    module = experts_of(5).to(dtype)
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    end_E = torch.tensor([0, 4, 4, 7, 9])
    weights = (module.gate_proj, module.up_proj, module.down_proj)
    upstream = torch.linspace(-1, 1, 9 * WIDTH).view(9, WIDTH).to(dtype)
    results = []
    for run in (grouped_swiglu, looped_swiglu):
        y = run(x, end_E, *weights)
        results.append((y, *torch.autograd.grad(y, [x, *weights], upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=atol, rtol=0.0)


def test_experts_are_stored_one_matrix_each() -> None:
    module, other = experts_of(3), Experts(3, WIDTH, EXPERT_SIZE)
    state = module.state_dict()
    assert sorted(state) == sorted(
        f"{index}.{name}_proj.weight" for index in range(3) for name in ("gate", "up", "down")
    )
    assert state["2.down_proj.weight"].shape == (WIDTH, EXPERT_SIZE)
    assert state["1.gate_proj.weight"].data_ptr() == module.gate_proj[1].data_ptr()  # a view, not a copy
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_a_wrong_state_is_refused() -> None:
    module = experts_of(2)
    state = dict(module.state_dict())
    state["0.up_proj.weight"] = torch.zeros(1, 1)
    state["2.up_proj.weight"] = state.pop("1.up_proj.weight")
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(state)
    text = str(caught.value)
    assert 'Missing key(s) in state_dict: "1.up_proj.weight"' in text
    assert 'Unexpected key(s) in state_dict: "2.up_proj.weight"' in text
    assert "0.up_proj.weight: got [1, 1], expected [24, 16]" in text


# --- routers


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_softmax_router(is_normalised: bool, has_bias: bool) -> None:
    router = filled(SoftmaxRouter(6, WIDTH, 2, is_normalised=is_normalised))
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))
    bias = torch.linspace(-0.5, 0.5, 6) if has_bias else None
    route = router(x, bias)
    for token in range(7):
        probability = torch.softmax(x[token] @ router.weight.detach().T, -1) + (0.0 if bias is None else bias)
        best = sorted(range(6), key=lambda expert: -float(probability[expert]))[:2]
        assert route.expert_NA[token].tolist() == best
        expected = probability[best] / (probability[best].sum() if is_normalised else 1.0)
        torch.testing.assert_close(route.weight_NA[token], expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_groups=st.sampled_from([1, 2, 4]), kept=st.integers(1, 4))
def test_grouped_router(seed: int, num_groups: int, kept: int) -> None:
    """Every choice by exhaustive comparison; the bias steers the choice and never the weights."""
    kept = min(kept, num_groups)
    router = filled(
        GroupedSigmoidRouter(8, WIDTH, 2, num_groups=num_groups, groups_per_token=kept, scale=2.5), seed=seed
    )
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
    route, size = router(x), 8 // num_groups
    for token in range(5):
        score = torch.sigmoid(x[token] @ router.weight.T)
        choice = (score + router.expert_bias).tolist()
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        value = {g: sum(sorted((choice[e] for e in members), reverse=True)[:2]) for g, members in enumerate(groups)}
        kept_groups = sorted(value, key=lambda g: -value[g])[:kept]
        allowed = [e for g in kept_groups for e in groups[g]]
        best = sorted(allowed, key=lambda e: -choice[e])[:2]
        assert sorted(route.expert_NA[token].tolist()) == sorted(best)
        chosen = score[route.expert_NA[token]]
        torch.testing.assert_close(route.weight_NA[token], chosen / chosen.sum() * 2.5)


def test_a_single_expert_keeps_its_score() -> None:
    router = filled(GroupedSigmoidRouter(4, WIDTH, 1, num_groups=2, groups_per_token=1, scale=1.0))
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    route = router(x)
    torch.testing.assert_close(route.weight_NA, route.logits_NE.sigmoid().gather(-1, route.expert_NA))


# --- recording


def test_load_counts_real_tokens_only() -> None:
    router = SoftmaxRouter(3, 2, 1, is_normalised=True)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, -1.0]])  # experts 0, 1, 1 and, at padding, 2
    load = ExpertLoad()
    assert load.metrics() == {}
    for _ in range(2):
        is_real_BT = torch.tensor([[True, True], [True, False]])
        with load.counting(router, is_real_BT, is_real_BT):
            router(x)
    router(x)  # outside, so it does not count
    assert load.metrics() == {"expert_imbalance": 2.0, "unused_experts": pytest.approx(1 / 3)}


def test_a_dense_network_has_no_load() -> None:
    load = ExpertLoad()
    with load.counting(nn.Linear(2, 2), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)):
        pass
    assert load.metrics() == {}


def test_routes_are_recorded_inside_the_block() -> None:
    router = filled(SoftmaxRouter(3, WIDTH, 2, is_normalised=True))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(4))
    with recorded_routes(router) as routes:
        route = router(x)
    router(x)
    (recorded,) = routes
    assert torch.equal(recorded.weight_NA, route.weight_NA)
    assert not recorded.weight_NA.requires_grad
