"""Credit for steps and nodes: golden numbers and the identities that hold for any rewards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.objectives.advantage import compute_advantages
from dare.objectives.stepwise import draft_gains, stepwise_gae
from dare.objectives.tree import node_values, sibling_advantages

REWARDS = st.lists(st.integers(0, 4), min_size=3, max_size=8)


def close(got: Tensor, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def test_draft_gains_golden() -> None:
    reward_D = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 0])
    sample_D, step_D = torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2)
    gain_D = draft_gains(reward_D, sample_D, step_D)
    close(gain_D.view(2, 4), [[5 / 3, 2.5, 1, 3], [1, 1, 1, 1]])
    advantage_D = compute_advantages("std4", gain_D, step_D)
    close(advantage_D[:4], [0.70695681, 0.70704012, 0.0, 0.70705678], atol=5e-8)
    total_T = advantage_D.view(2, 4).abs().sum(0)
    close(total_T, [1.41391363, 1.41408024, 0.0, 1.41411357], atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(REWARDS, st.integers(0, 3))
def test_draft_gains_by_their_definition(rewards: list[int], num_shorter: int) -> None:
    """Also when another sample has fewer steps, and in any order of the drafts."""
    short = rewards[: max(1, len(rewards) - num_shorter)]
    reward_D = torch.tensor([*rewards, *short], dtype=torch.float32)
    sample_D = torch.tensor([0] * len(rewards) + [1] * len(short))
    step_D = torch.tensor([*range(len(rewards)), *range(len(short))])
    expected = []
    for row in (rewards, short):
        for step, reward in enumerate(row):
            before, later = (row[step - 1] if step else 0), row[step + 1 :]
            expected.append(reward - before + 1 + (sum(later) / len(later) if later else reward))
    order_D = torch.arange(len(reward_D)).flip(0)
    close(draft_gains(reward_D, sample_D, step_D), expected)
    close(draft_gains(reward_D[order_D], sample_D[order_D], step_D[order_D]).flip(0), expected)


def test_gae_golden() -> None:
    step_BS, trained_BS = torch.tensor([[0, 0, 1, 2]]), torch.ones((1, 4), dtype=torch.bool)
    reward_BS = torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)
    value_BS = torch.tensor([[0.2, 0.4, 0.5, 0.3]], dtype=torch.float64)
    return_BS, advantage_BS = stepwise_gae(reward_BS, value_BS, step_BS, trained_BS, 0.9, 0.8)
    close(return_BS, [[0.81, 0.81, 0.9, 1.0]])
    close(advantage_BS, [[0.44728, 0.24728, 0.274, 0.7]])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3), st.booleans()), min_size=1, max_size=8),
    st.integers(-2, 2),
)
def test_gae_identities(tokens: list[tuple[int, int, bool]], reward: int) -> None:
    """gamma = lambda = 1: A = R - V. lambda = 0: the next step's mean value. Untrained tokens change nothing."""
    step_BS = torch.tensor([[step for step, _, _ in tokens]])
    value_BS = torch.tensor([[value / 4 for _, value, _ in tokens]], dtype=torch.float64)
    trained_BS = torch.tensor([[is_trained for _, _, is_trained in tokens]])
    last = int(torch.where(trained_BS, step_BS, -1).max())
    reward_BS = torch.where(trained_BS & (step_BS == last), float(reward), 0.0).double()
    return_BS, advantage_BS = stepwise_gae(reward_BS, value_BS, step_BS, trained_BS, 1.0, 1.0)
    close(return_BS, torch.where(trained_BS, float(reward), 0.0))
    close(advantage_BS, torch.where(trained_BS, reward - value_BS, 0.0))
    _, one_step_BS = stepwise_gae(reward_BS, value_BS, step_BS, trained_BS, 1.0, 0.0)
    for index, (step, _, is_trained) in enumerate(tokens):
        later = [s for s, _, trained in tokens if trained and s > step]
        next_value = 0.0
        if later:
            next_value = float(value_BS[trained_BS & (step_BS == min(later))].mean())
        expected = float(reward_BS[0, index] - value_BS[0, index]) + next_value if is_trained else 0.0
        assert float(one_step_BS[0, index]) == pytest.approx(expected, abs=1e-9)


def test_tree_golden() -> None:
    parent_N = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    is_leaf_N = torch.arange(7) >= 3
    value_N = node_values(torch.tensor([0.0, 0, 0, 1, 0, 1, 1]), parent_N, is_leaf_N)
    close(value_N, [0.75, 0.5, 1.0, 1, 0, 1, 1])
    close(sibling_advantages("loo", value_N, parent_N), [0, -0.5, 0.5, 1, -1, 0, 0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.integers(1, 3))
def test_tree_identities(rewards: list[int], num_children: int) -> None:
    """A balanced tree's root is the mean of its leaves; siblings' advantages add up to 0; an only child has none."""
    num_leaves = 6 // num_children
    parents = [-1, *[0] * num_children, *[1 + c for c in range(num_children) for _ in range(num_leaves)]]
    parent_N = torch.tensor(parents)
    is_leaf_N = torch.arange(len(parents)) > num_children
    reward_N = torch.zeros(len(parents))
    reward_N[is_leaf_N] = torch.tensor(rewards[: num_children * num_leaves], dtype=torch.float32)
    value_N = node_values(reward_N, parent_N, is_leaf_N)
    assert float(value_N[0]) == pytest.approx(float(reward_N[is_leaf_N].double().mean()))
    advantage_N = sibling_advantages("loo", value_N, parent_N)
    for parent in set(parents) - {-1}:
        assert float(advantage_N[parent_N == parent].sum()) == pytest.approx(0.0, abs=1e-5)
    if num_children == 1:
        assert float(advantage_N[1]) == 0.0
        assert float(sibling_advantages("loo", value_N, parent_N, only_child="value")[1]) == float(value_N[1].float())
