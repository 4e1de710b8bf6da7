"""Edits of committed tokens: what the log rebuilds, when a block comes to rest, and what edits must not depend on."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dare.core.checks import check
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.core.types import Edits, TraceBatch
from dare.diffusion import trace as traces
from dare.families.base import Family
from dare.rollout.engine import StepEvent, denoise
from tests.golden_checkpoints import golden_family

NAMES = ("llada2_1", "sdar", "llada", "dream")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3]]
EDITING: dict[str, Any] = {
    "gen_length": 12,
    "block_length": 4,
    "temperature": 1.0,
    "unmask": "threshold",
    "threshold": 0.3,
    "edit_threshold": 0.2,
    "max_post_steps": 5,
    "eos_stop": False,
}


def run(family: Family, *, seed: int = 0, on_step: Any = None, **options: Any) -> TraceBatch:
    decode = Decode(**(EDITING | options))
    return denoise(family, PROMPTS, decode, Key(seed), list(range(len(PROMPTS))), on_step=on_step)


def edits_of(trace: TraceBatch) -> Edits:
    assert trace.edits is not None
    return trace.edits


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_canvas_comes_back_bit_by_bit(name: str, options: dict[str, Any]) -> None:
    events: list[StepEvent] = []
    trace = run(golden_family(name), on_step=events.append, **options)
    assert len(edits_of(trace).row_E) > 0
    num_seen = 0
    for event in events:
        for index, (row, step) in enumerate(zip(event.rows, event.step_N.tolist(), strict=True)):
            is_real_S = trace.canvas.is_real_BS[row]
            before_S, after_S = (traces.canvas_before(trace, at)[row] for at in (step, step + 1))
            seen_S = event.ids_NS[index, : trace.canvas.length]
            is_new_S = event.is_committed_NS[index, : trace.canvas.length]
            assert torch.equal(seen_S[is_real_S], after_S[is_real_S])
            assert torch.equal((before_S != after_S)[is_real_S], is_new_S[is_real_S])
            num_seen += 1
    assert num_seen == int(trace.nfe_B.sum())
    assert not (traces.canvas_before(trace, 0) != trace.mask_id)[trace.canvas.is_completion_BS].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_log_is_a_history_of_each_position(name: str) -> None:
    """What stood at a position, in order: each entry begins where the one before ends, the last at the step map."""
    trace = run(golden_family(name))
    edits = edits_of(trace)
    order = list(zip(edits.row_E.tolist(), edits.until_E.tolist(), edits.position_E.tolist(), strict=True))
    assert order == sorted(order)
    assert ((edits.since_E >= 0) & (edits.since_E < edits.until_E)).all()
    assert (edits.logp_E < 0).all()
    for row, position in {(row, position) for row, _, position in order}:
        is_here_E = (edits.row_E == row) & (edits.position_E == position)
        starts = [*edits.since_E[is_here_E].tolist(), int(trace.step_map_BS[row, position])]
        assert starts[1:] == edits.until_E[is_here_E].tolist()
        tokens = [*edits.token_E[is_here_E].tolist(), int(trace.canvas.input_BS[row, position])]
        assert all(old != new for old, new in itertools.pairwise(tokens))
        assert bool(trace.canvas.is_completion_BS[row, position])


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    order=st.permutations(range(len(PROMPTS))),
    num_rows=st.integers(1, len(PROMPTS)),
    batch_size=st.integers(1, len(PROMPTS)),
)
def test_edits_do_not_depend_on_company(name: str, order: list[int], num_rows: int, batch_size: int) -> None:
    family, chosen = golden_family(name), order[:num_rows]
    decode = Decode(**EDITING | {"batch_size": batch_size})
    together = denoise(family, [PROMPTS[row] for row in chosen], decode, Key(3), [100 + row for row in chosen])
    for index, row in enumerate(chosen):
        alone = denoise(family, [PROMPTS[row]], decode, Key(3), [100 + row])
        (found, expected) = (traces.to_completions(trace)[at] for trace, at in ((together, index), (alone, 0)))
        assert (found.tokens, found.step_map, found.nfe) == (expected.tokens, expected.step_map, expected.nfe)
        mine_E = edits_of(together).row_E == index
        for field in ("position_E", "token_E", "since_E", "until_E"):
            assert torch.equal(getattr(together.edits, field)[mine_E], getattr(alone.edits, field))


@pytest.mark.parametrize("name", ["llada2_1", "sdar"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"max_post_steps": 0}, {"eos_stop": True}], ids=str)
def test_the_block_cache_is_exact_under_edits(name: str, options: dict[str, Any]) -> None:
    cached, recomputed = (run(golden_family(name), cache=cache, **options) for cache in ("auto", "none"))
    assert torch.equal(cached.canvas.input_BS, recomputed.canvas.input_BS)
    assert torch.equal(cached.step_map_BS, recomputed.step_map_BS)
    assert torch.equal(cached.nfe_B, recomputed.nfe_B)
    assert torch.equal(edits_of(cached).token_E, edits_of(recomputed).token_E)


def test_a_block_comes_to_rest_after_a_step_that_edits_nothing() -> None:
    """With a threshold that nothing passes, each block costs one confirming step more than without edits."""
    family = golden_family("llada2_1")
    plain = run(family, edit_threshold=None, max_post_steps=None, temperature=0.0)
    resting = run(family, edit_threshold=1.0, temperature=0.0)
    assert plain.edits is None
    assert len(edits_of(resting).row_E) == 0
    assert torch.equal(plain.canvas.input_BS, resting.canvas.input_BS)
    for row in range(len(PROMPTS)):
        num_blocks = len(plain.canvas.block_BS[row][plain.canvas.is_completion_BS[row]].unique())
        assert int(resting.nfe_B[row]) == int(plain.nfe_B[row]) + num_blocks


@pytest.mark.parametrize("max_post_steps", [0, 1, 3])
def test_post_steps_are_bounded(max_post_steps: int) -> None:
    trace = run(golden_family("llada2_1"), edit_threshold=0.0, max_post_steps=max_post_steps)
    step_BS = trace.step_map_BS
    for row in range(len(PROMPTS)):
        is_completion_S, block_S = trace.canvas.is_completion_BS[row], trace.canvas.block_BS[row]
        end = 0
        for block in block_S[is_completion_S].unique().tolist():
            is_here_S = is_completion_S & (block_S == block)
            entries = (edits_of(trace).row_E == row) & torch.isin(edits_of(trace).position_E, is_here_S.nonzero()[:, 0])
            first_write = {
                p: int(min([*edits_of(trace).since_E[entries & (edits_of(trace).position_E == p)], step_BS[row, p]]))
                for p in is_here_S.nonzero()[:, 0].tolist()
            }
            last_write = int(step_BS[row, is_here_S].max())
            assert last_write - max(first_write.values()) <= max_post_steps
            assert min(first_write.values()) >= end
            end = last_write + 1


def test_edits_without_a_prompt_position_or_the_mask_token() -> None:
    trace = run(golden_family("llada2_1"), edit_threshold=0.0)
    for row, prompt in enumerate(PROMPTS):
        assert trace.canvas.input_BS[row, : len(prompt)].tolist() == prompt
    assert not (trace.canvas.input_BS[trace.canvas.is_completion_BS] == trace.mask_id).any()
    assert not (edits_of(trace).token_E == trace.mask_id).any()


# --- options


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_post_steps needs edit_threshold"):
        Decode(max_post_steps=2)
    with pytest.raises(ValidationError, match="carried needs unmask: capped_threshold"):
        Decode(schedule="carried")
    with pytest.raises(ValidationError, match="has no schedule"):
        Decode(unmask="factor", schedule="timesteps")
    with pytest.raises(ValidationError, match="cannot fill a block"):
        Decode(block_length=4, steps_per_block=5)
    assert Decode(block_length=4, steps_per_block=5, schedule="timesteps").steps_per_block == 5


def test_algorithms_that_replay_traces_refuse_edits() -> None:
    recipe = {
        "name": "edits",
        "model": {"create": {"family": "sdar"}},
        "algorithm": {"name": "cj_grpo"},
        "task": {"name": "chain_sum"},
        "decode": {"temperature": 1.0, "unmask": "threshold", "edit_threshold": 0.9},
    }
    with pytest.raises(DareError, match="edits replace tokens"):
        check(parse_recipe(recipe, where="recipe"))
    recipe["algorithm"] = {"name": "espo"}
    check(parse_recipe(recipe, where="recipe"))


def test_edits_are_joined_in_order() -> None:
    def entry(row: int, position: int, until: int) -> Edits:
        one = torch.ones(1, dtype=torch.int64)
        return Edits(row * one, position * one, 7 * one, 0 * one, until * one, -one.float())

    joined = Edits.joined([entry(1, 0, 2), entry(0, 3, 2), entry(0, 1, 2), entry(0, 9, 1)])
    found = list(zip(joined.row_E.tolist(), joined.until_E.tolist(), joined.position_E.tolist(), strict=True))
    assert found == [(0, 1, 9), (0, 2, 1), (0, 2, 3), (1, 2, 0)]
    assert len(Edits.joined([]).row_E) == 0
    with pytest.raises(ValueError, match=r"Edits.logp_E"):
        dataclasses.replace(joined, logp_E=joined.logp_E.double())
