"""What a rollout records about its steps: nothing changes by recording, and the record rebuilds the rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.decode import Decode
from dare.core.predictions import NO_QUOTA
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.diffusion import unmask
from dare.diffusion.trace import canvas_before
from dare.report.trace_rows import Row, read_row
from dare.rollout.engine import denoise
from dare.rollout.trace_file import load_trace, save_trace
from tests.conftest import tiny_family

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 1, 2, 9], [8]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("llada", {"block_length": 6, "steps_per_block": 3}),
    "random": ("llada", {"block_length": 4, "unmask": "random", "temperature": 0.7}),
    "threshold": ("llada", {"block_length": 12, "unmask": "threshold", "threshold": 0.08, "temperature": 1.0}),
    "guided": ("llada", {"block_length": 6, "cfg_scale": 0.5}),
    "remasked": (
        "llada",
        {"block_length": 12, "steps_per_block": 4, "unmask": "max_prob", "remask": "rcr", "temperature": 1.5},
    ),
    "blocks": ("sdar", {"unmask": "entropy", "temperature": 1.0}),
    "left": ("sdar", {"unmask": "left_to_right", "eos_stop": False}),
    "edited": ("sdar", {"edit_threshold": 0.02, "max_post_steps": 3, "temperature": 1.0}),
}


def run(
    case: str, *, num: int = 4, batch_size: int = 8, prompts: list[list[int]] = PROMPTS, seed: int = 0
) -> TraceBatch:
    name, options = CASES[case]
    decode = Decode(gen_length=12, batch_size=batch_size, **options)
    ids = [11 + index for index in range(len(prompts))]
    return denoise(tiny_family(name), prompts, decode, Key(seed), ids, num_alternatives=num)


def rows(case: str, trace: TraceBatch, folder: Path) -> list[Row]:
    name, options = CASES[case]
    path = folder / f"{case}.safetensors"
    save_trace(path, trace, spec=tiny_family(name).spec, decode=Decode(gen_length=12, **options), piece=str)
    file = load_trace(path)
    assert file.missing == []
    return [read_row(file, index) for index in range(file.num_rows)]


@pytest.mark.parametrize("case", CASES)
def test_recording_changes_nothing(case: str) -> None:
    plain, recorded = run(case, num=0), run(case)
    assert plain.predictions is None
    assert torch.equal(plain.canvas.input_BS, recorded.canvas.input_BS)
    assert torch.equal(plain.logp_BS, recorded.logp_BS)
    assert torch.equal(plain.nfe_B, recorded.nfe_B)


@pytest.mark.parametrize("case", CASES)
def test_steps_rebuild_every_canvas(case: str, tmp_path: Path) -> None:
    trace = run(case)
    for index, row in enumerate(rows(case, trace, tmp_path)):
        width = len(row.final)
        assert len(row.steps) == int(trace.nfe_B[index])
        assert row.canvas(len(row.steps), trace.mask_id) == row.final
        assert row.final == trace.canvas.input_BS[index, :width].tolist()
        if case != "remasked":  # a step map does not say what was masked again
            for step in range(len(row.steps)):
                assert row.canvas(step, trace.mask_id) == canvas_before(trace, step)[index, :width].tolist()
        for step in row.steps:
            assert {c.position for c in step.candidates}.isdisjoint(step.remasked)
    if case == "remasked":
        assert trace.predictions is not None
        assert len(trace.predictions.row_M) > 0


@pytest.mark.parametrize("case", ["even", "remasked", "edited", "threshold"])
def test_nothing_depends_on_batching(case: str) -> None:
    together, alone = run(case), run(case, batch_size=1)
    assert together.predictions is not None
    assert alone.predictions is not None
    for name, tensor in together.predictions.tensors().items():
        other = alone.predictions.tensors()[name]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, other, atol=1e-5, rtol=0)
        elif name != "top_PA":  # near ties of improbable tokens may swap
            assert torch.equal(tensor, other), name


def test_probabilities_are_the_networks() -> None:
    """Against the logits of the canvas that the step read."""
    trace = run("even", prompts=[PROMPTS[0]])
    family, p = tiny_family("llada"), trace.predictions
    assert p is not None
    for step in range(int(trace.nfe_B[0])):
        probs_SV = family.logits(canvas_before(trace, step), None)[0].softmax(-1)
        chosen = p.step_P == step
        position = p.position_P[chosen]
        torch.testing.assert_close(p.prob_P[chosen], probs_SV[position, p.token_P[chosen]], atol=1e-5, rtol=0)
        allowed_SV = probs_SV.index_fill(-1, torch.tensor([trace.mask_id]), 0.0)
        torch.testing.assert_close(p.top_prob_PA[chosen], allowed_SV[position].topk(4).values, atol=1e-5, rtol=0)
    assert trace.mask_id not in p.top_PA


@pytest.mark.parametrize("case", ["even", "left", "blocks", "random"])
def test_what_is_committed_ranks_within_the_quota(case: str, tmp_path: Path) -> None:
    for row in rows(case, run(case), tmp_path):
        for step in row.steps:
            num_masked = len(step.candidates)
            ranks = sorted(c.rank for c in step.candidates if c.is_written and c.rank is not None)
            assert step.quota is not None
            assert ranks == list(range(1, min(step.quota, num_masked) + 1))


def test_policies_without_a_schedule_have_no_quota() -> None:
    trace = run("threshold")
    assert trace.predictions is not None
    assert set(trace.predictions.quota_D.tolist()) == {NO_QUOTA}


@pytest.mark.parametrize("policy", unmask.POLICIES)
def test_every_policy_has_its_rule_in_words(policy: str) -> None:
    decode = Decode.model_construct(**{**Decode().__dict__, "unmask": policy, "threshold": 0.77, "factor": 2.5})
    words = unmask.rule_in_words(decode)
    assert ("{quota}" in words) == unmask.has_quota(policy)
    assert "{" not in words.replace("{quota}", "")
    assert ("0.77" in words) == (policy in ("threshold", "capped_threshold"))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), num=st.integers(1, 40), case=st.sampled_from(sorted(CASES)))
def test_alternatives_are_sorted_and_include_a_greedy_candidate(seed: int, num: int, case: str) -> None:
    p = run(case, num=num, prompts=[PROMPTS[0]], seed=seed).predictions
    assert p is not None
    assert bool((p.top_prob_PA.diff(dim=-1) <= 0).all())
    assert float(p.top_prob_PA.sum(-1).max()) <= 1.0 + 1e-5
    assert p.top_PA.shape[1] == min(num, 23)  # a vocabulary of 24 with a mask token
    if CASES[case][1].get("temperature", 0.0) == 0.0:
        assert torch.equal(p.top_prob_PA[:, 0], p.prob_P) or torch.allclose(p.top_prob_PA[:, 0], p.prob_P, atol=1e-6)
