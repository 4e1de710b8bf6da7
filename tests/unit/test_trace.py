"""Step maps read back: canvases, scored positions, completions, statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dare.core.types import GIVEN, UNSAMPLED, Canvas, TraceBatch
from dare.diffusion import trace as traces
from dare.rollout.stats import rollout_stats

MASK, EOS, OTHER_EOS, PAD = 9, 8, 7, 6


def make_trace(prompts: list[list[int]], completions: list[list[int]], step_maps: list[list[int]]) -> TraceBatch:
    num, width = len(prompts), max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_BS = torch.full((num, width), PAD)
    step_map_BS = torch.full((num, width), GIVEN)
    is_completion_BS = torch.zeros(num, width, dtype=torch.bool)
    is_real_BS = torch.zeros(num, width, dtype=torch.bool)
    for row, (prompt, completion, steps) in enumerate(zip(prompts, completions, step_maps, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion)
        input_BS[row, :end] = torch.tensor(prompt + completion)
        step_map_BS[row, start:end] = torch.tensor(steps)
        is_completion_BS[row, start:end] = True
        is_real_BS[row, :end] = True
    trace = TraceBatch(
        canvas=Canvas(input_BS, is_completion_BS, is_real_BS, torch.zeros_like(input_BS), "full"),
        step_map_BS=step_map_BS,
        logp_BS=torch.where(step_map_BS >= 0, -0.25 * step_map_BS, 0.0),
        nfe_B=step_map_BS.amax(-1) + 1,
        is_eos_B=torch.zeros(num, dtype=torch.bool),
        sample_id_B=torch.arange(num),
        mask_id=MASK,
        eos_ids=(EOS, OTHER_EOS),
        temperature=1.0,
    )
    trace.is_eos_B = traces.has_eos(trace)
    return trace


@pytest.fixture
def trace() -> TraceBatch:
    return make_trace(
        [[1, EOS, 2], [3]],
        [[4, OTHER_EOS, 5, EOS], [1, 2, MASK]],
        [[2, 0, 1, 1], [1, 0, UNSAMPLED]],
    )


def test_every_canvas_comes_back(trace: TraceBatch) -> None:
    M = MASK
    assert traces.num_steps(trace) == 3
    assert traces.canvas_before(trace, 0).tolist() == [[1, EOS, 2, M, M, M, M], [3, M, M, M, PAD, PAD, PAD]]
    assert traces.canvas_before(trace, 1).tolist() == [[1, EOS, 2, M, OTHER_EOS, M, M], [3, M, 2, M, PAD, PAD, PAD]]
    assert traces.canvas_before(trace, 2).tolist() == [[1, EOS, 2, M, OTHER_EOS, 5, EOS], [3, 1, 2, M, PAD, PAD, PAD]]
    assert torch.equal(traces.canvas_before(trace, 3), trace.canvas.input_BS)


def test_completions_end_at_their_own_first_eos(trace: TraceBatch) -> None:
    is_scored = [[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]]
    assert traces.scored_mask(trace).int().tolist() == is_scored
    first, second = traces.to_completions(trace)
    assert (first.tokens, first.step_map, first.logp) == ([4, OTHER_EOS], [2, 0], [-0.5, 0.0])
    assert (first.finish, first.nfe, first.text) == ("eos", 3, None)
    assert (second.tokens, second.step_map) == ([1, 2, MASK], [1, 0, UNSAMPLED])
    assert (second.finish, second.nfe) == ("length", 2)


def test_statistics_count_tokens_through_eos(trace: TraceBatch) -> None:
    assert rollout_stats(trace) == {
        "nfe": 2.5,
        "completion_length": 2.5,
        "tokens_per_forward": 1.0,
        "eos_rate": 0.5,
        "truncation_rate": 0.5,
        "commit_nll": pytest.approx(0.15),
        "padding_share": pytest.approx(3 / 14),
    }


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 8), max_size=3),
            st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_read_back_as_if_alone(rows: list[tuple[list[int], list[tuple[int, int]]]]) -> None:
    prompts = [prompt for prompt, _ in rows]
    tokens = [[token for token, _ in completion] for _, completion in rows]
    steps = [[step for _, step in completion] for _, completion in rows]
    for index, found in enumerate(traces.to_completions(make_trace(prompts, tokens, steps))):
        ends = [k for k, token in enumerate(tokens[index]) if token in (EOS, OTHER_EOS)]
        length = ends[0] + 1 if ends else len(tokens[index])
        assert found.tokens == tokens[index][:length]
        assert found.step_map == steps[index][:length]
        assert found.finish == ("eos" if ends else "length")
        (alone,) = traces.to_completions(make_trace([prompts[index]], [tokens[index]], [steps[index]]))
        assert alone == found
