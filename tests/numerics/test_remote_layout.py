"""Any valid step map is read as it was made, in both numberings; any that is not one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.decode import Decode
from dare.core.rollout_recipe import RolloutRecipe
from dare.remote.contract import Answer, BadAnswer, Numbering
from dare.remote.trace import Layout
from dare.rollout.plan import make_plan
from tests.conftest import tiny_family

FAMILY = tiny_family("sdar")
OPTIONS = RolloutRecipe(engine="sglang", urls=("http://127.0.0.1:1",))
DYNAMIC = make_plan(FAMILY, Decode(gen_length=8, unmask="threshold"))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Layout, list[list[int]]]:
    """A layout of one row, and for each of its blocks the 0-based steps of its tokens."""
    layout = Layout(FAMILY, DYNAMIC, [[1] * draw(st.integers(1, 9))])
    blocks = layout.blocks[0]
    parts = []
    for block in dict.fromkeys(blocks):
        size = blocks.count(block)
        num = draw(st.integers(1, size))
        rest = draw(st.lists(st.integers(0, num - 1), min_size=size - num, max_size=size - num))
        parts.append(draw(st.permutations([*range(num), *rest])))
    return layout, parts


def numbered(parts: list[list[int]], numbering: Numbering) -> list[int]:
    steps, done = [], 0
    for part in parts:
        steps += [step + 1 + (done if numbering == "row" else 0) for step in part]
        done += max(part) + 1
    return steps


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from(["block", "row"]), st.data())
def test_step_maps(made: tuple[Layout, list[list[int]]], numbering: Numbering, data: st.DataObject) -> None:
    layout, parts = made
    steps, num = numbered(parts, numbering), layout.num_tokens(0)
    row = layout.checked(Answer([1] * num, steps, None, None), 0, numbering, OPTIONS)
    assert row.steps is not None
    assert [step + 1 for step in row.steps] == numbered(parts, "row")
    trace = layout.trace([row], [7], 0)
    assert int(trace.nfe_B[0]) == sum(max(part) + 1 for part in parts)
    assert trace.missing == ("logp",)
    place = data.draw(st.integers(0, num - 1))
    wrong = data.draw(
        st.sampled_from(
            [
                steps[:-1],
                [*steps, steps[-1]],
                [step + 1 for step in steps],
                [*steps[:place], 0, *steps[place + 1 :]],
                [*steps[:place], max(steps) + 5, *steps[place + 1 :]],
                [*steps[:place], -1, *steps[place + 1 :]],
            ]
        )
    )
    with pytest.raises(BadAnswer):
        layout.checked(Answer([1] * num, wrong, None, None), 0, numbering, OPTIONS)
