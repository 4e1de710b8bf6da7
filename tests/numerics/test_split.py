"""Rollouts and views cut into parts and put together are those of the whole."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dare.core.decode import Decode
from dare.core.recipe import TrainRecipe
from dare.core.rng import Key
from dare.core.types import AuxLoss, Samples, Views
from dare.executors.verl.split import auxiliary_of, make_shards, split_groups, split_rows
from dare.families.base import Family
from dare.rollout.engine import denoise
from dare.rollout.join import join_traces
from dare.rollout.tree import grow_trees
from dare.training.micro_batches import forwards

PROMPTS = [[1, 2, 3, 4, 5]] * 2 + [[6]] * 2 + [[7, 8, 9]] * 2


def assert_equal(one: Any, other: Any) -> None:
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 if left.is_floating_point() else 0)
        elif hasattr(left, "__dataclass_fields__"):
            assert_equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize("name", ["llada", "sdar"])
@pytest.mark.parametrize("num_workers", [2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"edit_threshold": 0.0, "max_post_steps": 2}, {"remask": "rcr"}])
def test_joined_rollouts(families: dict[str, Family], name: str, num_workers: int, options: dict[str, Any]) -> None:
    family = families[name]
    base = {"gen_length": 8, "block_length": 4, "steps_per_block": 2, "unmask": "max_prob", "temperature": 1.0}
    decode = Decode.model_validate({**base, **options})
    ids = [50 + row for row in range(len(PROMPTS))]
    has_drafts = "edit_threshold" not in options
    records: dict[str, Any] = {"has_drafts": has_drafts, "num_alternatives": 3}
    whole = denoise(family, PROMPTS, decode, Key(3), ids, **records)
    parts = []
    for rows in split_groups(len(PROMPTS), num_workers, 1):
        if rows:
            prompts = [PROMPTS[row] for row in rows]
            parts.append(denoise(family, prompts, decode, Key(3), [ids[row] for row in rows], **records))
    joined = join_traces(parts, family.empty_canvas(PROMPTS, decode.gen_length, 4), family.spec.pad_id)
    for trace in (whole, joined):
        if trace.drafts is not None:  # what they hold beyond the end of a row means nothing
            is_beyond_DS = ~trace.canvas.is_real_BS[trace.drafts.sample_D]
            for drafted_DS in (trace.drafts.seen_DS, trace.drafts.draft_DS, trace.drafts.logp_DS):
                drafted_DS[is_beyond_DS] = 0
    assert_equal(whole, joined)


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_joined_trees(families: dict[str, Family], name: str) -> None:
    """Nodes come tree by tree instead of level by level; each still hangs where it did."""
    family = families[name]
    decode = Decode(gen_length=8, block_length=4, steps_per_block=2, unmask="max_prob", temperature=1.0)
    ids = list(range(len(PROMPTS)))
    whole = grow_trees(family, PROMPTS, decode, Key(3), ids, (2,))
    parts = [
        grow_trees(family, [PROMPTS[row] for row in rows], decode, Key(3), [ids[row] for row in rows], (2,))
        for rows in split_groups(len(PROMPTS), 2, 2)
    ]
    joined = join_traces(parts, family.empty_canvas(PROMPTS, 8, 4), family.spec.pad_id)
    assert joined.tree is not None
    assert whole.tree is not None
    assert torch.equal(joined.canvas.input_BS, whole.canvas.input_BS)
    edges = []
    for tree in (whole.tree, joined.tree):
        states = [tuple(state) for state in tree.state_NS.tolist()]
        parents = [states[parent] if parent >= 0 else None for parent in tree.parent_N.tolist()]
        edges.append(sorted(zip(map(str, states), map(str, parents), tree.sample_N.tolist(), strict=True)))
    assert edges[0] == edges[1]


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_groups_stay_whole_and_parts_even(num_groups: int, num_workers: int, group_size: int) -> None:
    parts = split_groups(num_groups * group_size, num_workers, group_size)
    assert [row for part in parts for row in part] == list(range(num_groups * group_size))
    assert all(part.start % group_size == 0 and len(part) % group_size == 0 for part in parts)
    sizes = [len(part) // group_size for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.data())
def test_shards_hold_every_view_once_and_forward_equally_often(data: st.DataObject) -> None:
    num_views, num_workers = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    micro = data.draw(st.integers(1, 7))
    sample_R = torch.tensor(sorted(data.draw(st.lists(st.integers(0, 4), min_size=num_views, max_size=num_views))))
    ids_RS = torch.arange(num_views * 3).view(num_views, 3)
    yes_RS, zero_R = torch.ones_like(ids_RS, dtype=torch.bool), torch.zeros(num_views, dtype=torch.int64)
    views = Views(ids_RS, ids_RS, ids_RS, yes_RS, torch.ones(num_views, 3), sample_R, zero_R)
    samples = _samples()
    rows = torch.tensor(data.draw(st.lists(st.sampled_from(range(num_views)), min_size=1, unique=True))).sort().values
    parts = split_rows(rows, num_workers)
    lengths = samples.canvas.is_real_BS.sum(-1)[views.sample_R]
    is_packed = data.draw(st.booleans())
    limits = {"pack_length": 3 * micro} if is_packed else {"micro_batch_views": micro, "micro_batch_tokens": 3 * micro}
    shards = make_shards(views, samples, parts, partial(forwards, train=TrainRecipe(**limits)))
    assert torch.equal(torch.cat(parts), rows)
    assert len({len(shard.parts) for shard in shards}) == 1
    for part, shard in zip(parts, shards, strict=True):
        assert all(int(lengths[part][piece].sum()) <= 3 * micro for piece in shard.parts)
        assert torch.equal(torch.cat(shard.parts).sort().values, torch.arange(len(part)))
        if len(part):
            assert torch.equal(shard.views.noisy_RS, ids_RS[part])
            assert torch.equal(shard.canvas.input_BS[shard.views.sample_R], samples.canvas.input_BS[sample_R[part]])


def test_auxiliary_terms_keep_their_numbers() -> None:
    def term(logits_CV: torch.Tensor, entry_C: torch.Tensor) -> torch.Tensor:
        return logits_CV[:, 0] + 10.0 * entry_C

    whole = AuxLoss(torch.tensor([4, 1, 2, 1]), torch.tensor([0, 1, 2, 3]), term, "aux")
    seen = []
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 4]), torch.tensor([3])):
        mine, entries = auxiliary_of(whole, rows)
        assert mine is not None
        assert torch.equal(rows[mine.view_A], whole.view_A[entries])
        assert torch.equal(mine.position_A, whole.position_A[entries])
        values = mine.term(torch.zeros(len(entries), 2), torch.arange(len(entries)))
        assert values.tolist() == (10.0 * entries).tolist()
        seen += entries.tolist()
    assert sorted(seen) == [0, 1, 2, 3]


def _samples() -> Samples:
    from tests.conftest import tiny_family

    family = tiny_family("llada")
    canvas = family.canvas([[row + 1] for row in range(5)], [[7, 8]] * 5)
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(5),
        advantage_B=torch.zeros(5),
        group_B=torch.arange(5),
        mask_id=family.spec.mask_id,
    )
