"""Unmask policies: each vectorised rule against its definition row by row, and what holds for all of them."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dare.core.decode import DYNAMIC_POLICIES, Decode, UnmaskPolicy
from dare.core.errors import DareError
from dare.diffusion import unmask

GOLDEN = Path(__file__).parents[1] / "golden"
POLICIES = typing.get_args(UnmaskPolicy)
SCHEDULED = [name for name in POLICIES if name not in (*DYNAMIC_POLICIES, "independent", "capped_threshold")]

# (score, is masked) of one row; few distinct scores, so that ties are common
ROW = st.lists(st.tuples(st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.9, 0.97, 1.0]), st.booleans()), min_size=6, max_size=6)


def decide(policy: str, rows: list[list[tuple[float, bool]]], quotas: list[int], **options: float) -> list[set[int]]:
    """Committed columns of each row; scores are confidences, or entropies where the policy ranks by those."""
    sign = -1.0 if unmask.POLICIES[policy].score == "negative_entropy" else 1.0
    score_BK = sign * torch.tensor([[score for score, _ in row] for row in rows])
    is_masked_BK = torch.tensor([[is_masked for _, is_masked in row] for row in rows])
    decode = Decode(unmask=policy, **options)
    chosen_BK = unmask.commits(policy, score_BK, is_masked_BK, torch.tensor(quotas), decode)
    return [set(row.nonzero()[:, 0].tolist()) for row in chosen_BK]


def ranked(row: list[tuple[float, bool]], *, is_ascending: bool = False) -> list[int]:
    """Masked columns, best first, equal ones from left to right."""
    sign = 1 if is_ascending else -1
    return sorted((k for k, (_, is_masked) in enumerate(row) if is_masked), key=lambda k: (sign * row[k][0], k))


def test_the_table_is_the_schema() -> None:
    assert set(unmask.POLICIES) == set(POLICIES)
    exact = {name for name in POLICIES if unmask.is_distribution_only(name)}
    assert exact == {"max_prob", "entropy", "margin", "random", "left_to_right", "independent", "entropy_bound"}
    with pytest.raises(DareError, match="did you mean 'entropy'"):
        unmask.find_policy("entrpy")


@pytest.mark.parametrize("policy", SCHEDULED)
@settings(max_examples=60)
@given(rows=st.lists(ROW, min_size=1, max_size=4), data=st.data())
def test_scheduled_policies_commit_the_best(
    policy: str, rows: list[list[tuple[float, bool]]], data: st.DataObject
) -> None:
    quotas = data.draw(st.lists(st.integers(0, 7), min_size=len(rows), max_size=len(rows)))
    is_ascending = unmask.POLICIES[policy].score == "negative_entropy"
    expected = [set(ranked(row, is_ascending=is_ascending)[:n]) for row, n in zip(rows, quotas, strict=True)]
    assert decide(policy, rows, quotas) == expected


@settings(max_examples=80)
@given(row=ROW, threshold=st.sampled_from([0.0, 0.4, 0.5, 0.95, 1.0]), min_commit=st.integers(1, 3))
def test_threshold(row: list[tuple[float, bool]], threshold: float, min_commit: int) -> None:
    order = ranked(row)
    num_above = sum(row[k][0] > torch.tensor(threshold) for k in order)
    expected = set(order[: max(min_commit, num_above)])
    assert decide("threshold", [row], [0], threshold=threshold, min_commit=min_commit) == [expected]


@settings(max_examples=80)
@given(row=ROW, factor=st.sampled_from([0.25, 0.5, 1.0, 1.5]))
def test_factor(row: list[tuple[float, bool]], factor: float) -> None:
    """The published loop: stop at the first rank below its limit; at the first or the last one, take one more."""
    order = ranked(row)
    num = 0
    for num in range(len(order)):
        limit = -1.0 if num == 0 else 1.0 - factor / (num + 2)
        if row[order[num]][0] < limit - 1e-9:
            break
    if order and num in (0, len(order) - 1):
        num += 1
    assert decide("factor", [row], [0], factor=factor) == [set(order[:num])]


@settings(max_examples=80)
@example(row=[(0.05, False)] * 3 + [(0.05, True), (0.97, True), (1.0, True)], bound=2.02)
@given(row=ROW, bound=st.sampled_from([0.01, 0.35, 1.0, 2.02, 9.0]))
def test_entropy_bound(row: list[tuple[float, bool]], bound: float) -> None:
    order = ranked(row, is_ascending=True)
    sums = torch.tensor([row[k][0] for k in order]).cumsum(0)
    num = max(1, int((sums < torch.tensor(bound)).sum()))  # both float32: a sum may equal its rounded bound
    assert decide("entropy_bound", [row], [0], entropy_bound=bound) == [set(order[:num])]


@pytest.mark.parametrize(("policy", "name", "value"), [
    ("threshold", "threshold", 0.9), ("threshold", "min_commit", 1), ("factor", "factor", 1.0),
    ("entropy_bound", "entropy_bound", 0.35),
])  # fmt: skip
@given(row=ROW)
def test_defaults_are_the_documented_ones(policy: str, name: str, value: float, row: list[tuple[float, bool]]) -> None:
    assert decide(policy, [row], [0]) == decide(policy, [row], [0], **{name: value})


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30)
@given(rows=st.lists(ROW, min_size=2, max_size=5))
def test_rows_are_independent_progress_and_touch_only_masks(policy: str, rows: list[list[tuple[float, bool]]]) -> None:
    quotas = [1 + index for index in range(len(rows))]
    together = decide(policy, rows, quotas)
    assert together == [decide(policy, [row], [n])[0] for row, n in zip(rows, quotas, strict=True)]
    for row, chosen in zip(rows, together, strict=True):
        masked = {k for k, (_, is_masked) in enumerate(row) if is_masked}
        assert chosen <= masked
        assert chosen or not masked or policy == "independent"  # which may reveal nothing before the last step


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_schedules_are_the_published_ones(family: str) -> None:
    tensors = load_file(GOLDEN / family / "decode.safetensors")
    cases = {n: m for n, m in json.loads((GOLDEN / family / "decode.json").read_text()).items() if "prim_quota" in n}
    assert cases
    for name, meta in cases.items():
        expected_BT = torch.atleast_2d(tensors[f"{name}/quota"])
        if family == "llada":
            num_masked_B = tensors[f"{name}/mask_index"].sum(-1)
        else:
            num_masked_B = torch.tensor([meta["block_length"]])
        num_steps = expected_BT.shape[1]
        steps = [unmask.quota(num_masked_B, num_steps, torch.full_like(num_masked_B, s)) for s in range(num_steps)]
        assert torch.equal(torch.stack(steps, -1), expected_BT)


@given(num_masked=st.integers(0, 200), num_steps=st.integers(1, 200))
def test_a_schedule_spreads_all_masks_evenly(num_masked: int, num_steps: int) -> None:
    quota_T = unmask.quota(torch.tensor(num_masked), num_steps, torch.arange(num_steps))
    assert int(quota_T.sum()) == num_masked
    assert int(quota_T.max() - quota_T.min()) <= 1
    assert torch.equal(quota_T, quota_T.sort(descending=True).values)


# --- Dream's and Fast-dLLM's schedules


@pytest.mark.parametrize("index", range(5))
def test_timesteps_reveal_what_dream_reveals(index: int) -> None:
    counts = load_file(GOLDEN / "dream" / "decode.safetensors")["prim_transfer_counts/counts"][index]
    expected = counts[counts >= 0].tolist()
    left, found = 12, []
    for step in range(len(expected)):
        quota_B, _ = unmask.due(
            "timesteps", torch.tensor([12]), torch.tensor([left]), len(expected), torch.tensor([step])
        )
        found.append(int(quota_B))
        left -= found[-1]
    assert found == expected
    assert left == 0


@given(num_masked=st.integers(1, 40), num_steps=st.integers(1, 50), data=st.data())
def test_every_schedule_reveals_everything_by_its_last_step(
    num_masked: int, num_steps: int, data: st.DataObject
) -> None:
    """Also if some steps commit less than they may, as `carried` allows."""
    for schedule in unmask.SCHEDULES:
        left = num_masked
        for step in range(num_steps):
            due = unmask.due(
                schedule, torch.tensor([num_masked]), torch.tensor([left]), num_steps, torch.tensor([step])
            )
            assert 0 <= int(due.quota_B) <= left
            assert 0.0 < float(due.share_B) <= 1.0
            is_lazy = schedule == "carried" and step < num_steps - 1
            left -= data.draw(st.integers(0, int(due.quota_B))) if is_lazy else int(due.quota_B)
        assert left == 0
    with pytest.raises(DareError, match="did you mean 'even'"):
        unmask.due("evn", torch.tensor([1]), torch.tensor([1]), 1, torch.tensor([0]))


@given(row=ROW, quota=st.integers(0, 7))
def test_a_capped_threshold_is_a_threshold_among_the_best(row: list[tuple[float, bool]], quota: int) -> None:
    best = ranked(row)[: max(quota, 1)]
    expected = {k for rank, k in enumerate(best) if rank == 0 or row[k][0] > torch.tensor(0.8)}
    assert decide("capped_threshold", [row], [quota], threshold=0.8) == [expected]


def test_independent_positions_compare_their_own_number_with_the_share() -> None:
    score_BK = torch.tensor([[0.1, 0.2, 0.6, 0.1]])
    is_masked_BK = torch.tensor([[True, True, True, False]])
    decode, quota_B = Decode(unmask="independent"), torch.tensor([0])
    for share, expected in ((0.15, [0]), (0.5, [0, 1]), (1.0, [0, 1, 2])):
        chosen = unmask.commits("independent", score_BK, is_masked_BK, quota_B, decode, torch.tensor([share]))
        assert chosen[0].nonzero()[:, 0].tolist() == expected
