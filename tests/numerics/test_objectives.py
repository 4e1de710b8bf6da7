"""Advantages, the clipped surrogate, KL estimators and reductions: golden numbers and algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.core.errors import DareError
from dare.objectives import reduce
from dare.objectives.advantage import RULES, compute_advantages
from dare.objectives.kl import ESTIMATORS, estimate_kl
from dare.objectives.surrogate import clipped_surrogate

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])
rewards = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=8)
all_rules = pytest.mark.parametrize("rule", list(RULES))


def advantages(rule: str, values: list[float] | Tensor) -> Tensor:
    reward_B = torch.as_tensor(values, dtype=torch.float32)
    return compute_advantages(rule, reward_B, torch.zeros(len(reward_B), dtype=torch.int64))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", [0.41666667, -0.58333333, -0.58333333, 0.41666667, 0.41666667, -0.08333333]),
        ("std4", [0.847407, -1.1863698, -1.1863698]),
        ("std6", [0.84757766, -1.18660872, -1.18660872]),
        ("zpop", [0.92847669, -1.29986737, -1.29986737]),
        ("loo", [0.5, -0.7, -0.7, 0.5, 0.5, -0.1]),
    ],
)
def test_golden_advantages(rule: str, expected: list[float]) -> None:
    torch.testing.assert_close(advantages(rule, REWARDS)[: len(expected)], torch.tensor(expected), rtol=2e-7, atol=1e-7)


@all_rules
@settings(max_examples=40, deadline=None)
@given(first=rewards, second=rewards, order=st.randoms(use_true_random=False))
def test_groups_do_not_mix_and_order_does_not_matter(
    rule: str, first: list[float], second: list[float], order: object
) -> None:
    reward_B = torch.tensor(first + second)
    group_B = torch.tensor([7] * len(first) + [3] * len(second))
    expected = torch.cat([advantages(rule, first), advantages(rule, second)])
    shuffled = list(range(len(reward_B)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    got = compute_advantages(rule, reward_B[shuffled], group_B[shuffled])
    torch.testing.assert_close(got, expected[shuffled], rtol=1e-5, atol=1e-6)


@all_rules
@settings(max_examples=40, deadline=None)
@given(values=rewards, shift=st.integers(-20, 20))
def test_advantages_sum_to_zero_and_ignore_a_shift(rule: str, values: list[float], shift: int) -> None:
    got = advantages(rule, values)
    assert float(got.sum()) == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(advantages(rule, [value + shift for value in values]), got, rtol=1e-5, atol=1e-6)
    scaled = advantages(rule, [8 * value for value in values])
    if rule in ("mean", "loo"):
        torch.testing.assert_close(scaled, 8 * got, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(scaled, got, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(values=rewards)
def test_leave_one_out(values: list[float]) -> None:
    num = len(values)
    expected = [value - (sum(values) - value) / (num - 1) for value in values]
    torch.testing.assert_close(advantages("loo", values), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages("loo", values), advantages("mean", values) * num / (num - 1))


@all_rules
def test_nothing_to_compare_is_zero(rule: str) -> None:
    assert advantages(rule, [2.0]).tolist() == [0.0]
    assert advantages(rule, [0.1] * 7).tolist() == [0.0] * 7  # 7 * 0.1 / 7 is not 0.1 in floating point
    mixed = compute_advantages(rule, torch.tensor([0.3, 1.0, 0.3, 0.0]), torch.tensor([0, 1, 0, 1]))
    assert mixed[[0, 2]].tolist() == [0.0, 0.0]
    assert mixed[1] > 0 > mixed[3]


def test_unknown_names_list_the_closest() -> None:
    with pytest.raises(DareError) as error:
        compute_advantages("lou", REWARDS, torch.zeros(6, dtype=torch.int64))
    assert "did you mean 'loo'" in str(error.value)
    with pytest.raises(DareError, match="unknown KL estimator 'k4'"):
        estimate_kl("k4", REWARDS)


@settings(max_examples=200, deadline=None)
@given(
    log_ratio=st.floats(-3, 3),
    advantage=st.floats(-2, 2),
    eps_low=st.floats(0, 0.9),
    eps_high=st.floats(0, 2),
    cap=st.none() | st.floats(3.5, 9),
)
def test_surrogate_is_the_textbook_formula(
    log_ratio: float, advantage: float, eps_low: float, eps_high: float, cap: float | None
) -> None:
    leaf = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    objective, is_clipped = clipped_surrogate(
        leaf, torch.tensor([advantage], dtype=torch.float64), eps_low, eps_high, cap
    )
    ratio = math.exp(log_ratio)
    expected = min(ratio * advantage, min(max(ratio, 1 - eps_low), 1 + eps_high) * advantage)
    if cap is not None and advantage < 0:
        expected = max(expected, cap * advantage)
    assert float(objective.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    (slope,) = torch.autograd.grad(objective.sum(), leaf)
    expected_slope = 0.0 if bool(is_clipped) else ratio * advantage
    assert float(slope) == pytest.approx(expected_slope, rel=1e-6, abs=1e-9)


def test_surrogate_neither_overflows_nor_blocks_the_first_step() -> None:
    leaf = torch.tensor([5000.0, -5000.0], dtype=torch.float64, requires_grad=True)
    objective, is_clipped = clipped_surrogate(leaf, torch.tensor([1.0, -1.0]), 0.2, 0.3)
    assert objective.tolist() == pytest.approx([1.3, -0.8])
    assert is_clipped.tolist() == [True, True]
    assert torch.autograd.grad(objective.sum(), leaf)[0].tolist() == [0.0, 0.0]
    capped, is_clipped = clipped_surrogate(torch.tensor([5000.0]), torch.tensor([-2.0]), 0.2, 0.2, dual_clip=3.0)
    assert capped.tolist() == pytest.approx([-6.0])
    assert is_clipped.tolist() == [True]
    on_policy = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    objective, is_clipped = clipped_surrogate(on_policy, torch.tensor([1.5, -0.5]), 0.0, 0.0)
    assert not bool(is_clipped.any())
    assert torch.autograd.grad(objective.sum(), on_policy)[0].tolist() == [1.5, -0.5]


def test_kl_estimators() -> None:
    difference = torch.tensor([0.0, 0.5, -0.5, 2.0], dtype=torch.float64)
    assert estimate_kl("k1", difference).tolist() == [0.0, 0.5, -0.5, 2.0]
    assert estimate_kl("k2", difference).tolist() == [0.0, 0.125, 0.125, 2.0]
    expected = [0.0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, math.exp(-2) + 1]
    assert estimate_kl("k3", difference).tolist() == pytest.approx(expected, abs=1e-15)
    tiny = torch.tensor([1e-9], dtype=torch.float64)
    assert float(estimate_kl("k3", tiny)) == pytest.approx(5e-19, abs=1e-18)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_kl_is_estimated_from_samples_of_the_policy(name: str) -> None:
    """k1 and k3 average to KL(policy || reference), by enumeration; k2 only for close policies."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64)
    difference = policy.log() - reference.log()
    expected = float((policy * difference).sum())
    got = float((policy * estimate_kl(name, difference)).sum())
    assert got == pytest.approx(expected, abs=2e-4 if name == "k2" else 1e-15)


def test_reductions_divide_by_global_counts() -> None:
    value = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.nan, torch.nan]], dtype=torch.float64)
    is_counted = torch.tensor([[True, True, False], [True, False, False]])
    assert float(reduce.masked_mean(value, is_counted)) == pytest.approx(7 / 3)
    assert float(reduce.mean_of_means(value, is_counted, torch.tensor([[0], [2]]), 3)) == pytest.approx((1.5 + 4) / 2)
    metric = reduce.metric(value, is_counted)
    assert (metric.total, metric.count, metric.mean) == (7.0, 3.0, pytest.approx(7 / 3))
    assert reduce.metric(torch.tensor([True, False])).mean == 0.5
    assert float(reduce.mean(torch.tensor([1.0, 2.0, 6.0]))) == 3.0


def test_nothing_counted_is_zero_with_zero_gradient() -> None:
    value = torch.ones(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = reduce.masked_mean(value, nothing) + reduce.mean_of_means(value, nothing, torch.zeros(2, 1).long(), 2)
    total = total + reduce.divide(value.sum(-1), torch.zeros(2, dtype=torch.int64)).sum()
    assert float(total.detach()) == 0.0
    assert torch.autograd.grad(total, value)[0].abs().max() == 0.0
    assert reduce.metric(value, nothing).mean == 0.0
