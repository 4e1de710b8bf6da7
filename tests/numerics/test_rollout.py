"""The denoising engine on tiny models: schedules, replay, batch invariance, stopping, guidance, keyed randomness."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.decode import DYNAMIC_POLICIES, Decode, UnmaskPolicy
from dare.core.errors import NonFiniteError
from dare.core.rng import Key
from dare.core.types import GIVEN, UNSAMPLED, Samples, TraceBatch
from dare.diffusion import corrupt, unmask
from dare.diffusion import trace as traces
from dare.families.base import Family
from dare.families.weights import load_family
from dare.rollout.engine import StepEvent, denoise
from tests.conftest import tiny_family

POLICIES = typing.get_args(UnmaskPolicy)
HAS_EMPTY_STEPS = ("independent", "capped_threshold")  # their counts are not those of an even schedule
FAMILIES = ("llada", "sdar")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3], [2, 7, 1, 8, 2, 8]]
BASE: dict[str, Any] = {"gen_length": 12, "block_length": 4, "temperature": 1.0}

# Random weights with enlarged heads: predictions are varied, and some of them are confident.
GOLDEN = Path(__file__).parents[1] / "golden"
_FAMILIES = {name: load_family(GOLDEN / name, torch.float32) for name in FAMILIES}


def run(family: Family, prompts: list[list[int]] = PROMPTS, *, seed: int = 0, **options: Any) -> TraceBatch:
    decode = Decode(**(BASE | options))
    return denoise(family, prompts, decode, Key(seed), list(range(len(prompts))))


def ending_early(family: Family, num_eos: int = 16) -> Family:
    """The same network with many EOS tokens."""
    other = copy.copy(family)
    other.spec = dataclasses.replace(family.spec, eos_ids=tuple(range(10, 10 + num_eos)))
    return other


def as_samples(trace: TraceBatch) -> Samples:
    num = trace.canvas.batch_size
    return Samples(
        canvas=trace.canvas,
        is_scored_BS=traces.scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.zeros(num),
        group_B=torch.zeros(num, dtype=torch.int64),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
    )


def replayed_logp(family: Family, trace: TraceBatch) -> torch.Tensor:
    """float32 [B, S]: log-prob of every sampled token on the canvas that a trainer rebuilds for its step."""
    views = corrupt.trace_replay(as_samples(trace), trace.step_map_BS >= 0, temperature=trace.temperature or 1.0)
    logp_RS = family.view_logp(views, trace.canvas.rows(views.sample_R)).detach()
    return torch.zeros_like(trace.logp_BS).index_add(0, views.sample_R, logp_RS)


# --- schedules ---


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in HAS_EMPTY_STEPS])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_policy_fills_block_after_block(name: str, policy: str) -> None:
    steps = {} if policy in DYNAMIC_POLICIES else {"steps_per_block": 3}
    trace = run(_FAMILIES[name], unmask=policy, eos_stop=False, **steps)
    canvas, step_map_BS = trace.canvas, trace.step_map_BS
    assert not (canvas.input_BS == trace.mask_id).any()
    assert torch.equal(step_map_BS >= 0, canvas.is_completion_BS)
    assert (step_map_BS[~canvas.is_completion_BS] == GIVEN).all()
    assert (trace.logp_BS[canvas.is_completion_BS] < 0).all()
    assert not trace.logp_BS[~canvas.is_completion_BS].any()
    for row, prompt in enumerate(PROMPTS):
        assert canvas.input_BS[row, : len(prompt)].tolist() == prompt
        steps_of_blocks = [
            step_map_BS[row, (canvas.block_BS[row] == block) & canvas.is_completion_BS[row]].tolist()
            for block in canvas.block_BS[row][canvas.is_completion_BS[row]].unique().tolist()
        ]
        assert sorted({s for block in steps_of_blocks for s in block}) == list(range(int(trace.nfe_B[row])))
        for block, later in itertools.pairwise(steps_of_blocks):
            assert max(block) < min(later)
        if policy not in DYNAMIC_POLICIES:
            for block in steps_of_blocks:
                counts = [block.count(step) for step in range(min(block), max(block) + 1)]
                assert counts == [c for c in (len(block) // 3 + (s < len(block) % 3) for s in range(3)) if c]


@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_policies_commit_several_tokens_at_once(name: str) -> None:
    for policy, options in (
        ("threshold", {"threshold": 0.3}),
        ("factor", {}),
        ("entropy_bound", {"entropy_bound": 2.0}),
    ):
        trace = run(_FAMILIES[name], unmask=policy, eos_stop=False, **options)
        num_completion_B = trace.canvas.is_completion_BS.sum(-1)
        assert (trace.nfe_B < num_completion_B).any(), policy
        assert (trace.nfe_B >= num_completion_B // 4).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_left_to_right_is_left_to_right(name: str) -> None:
    trace = run(_FAMILIES[name], unmask="left_to_right", eos_stop=False)
    for row in range(len(PROMPTS)):
        steps = trace.step_map_BS[row][trace.canvas.is_completion_BS[row]].tolist()
        assert steps == list(range(len(steps)))


@pytest.mark.parametrize(("length", "steps", "counts"), [(16, None, [1, 2, 4, 9]), (8, 2, [1, 7]), (4, 4, [1, 2, 1])])
def test_ascending_steps_double_and_the_last_takes_the_rest(length: int, steps: int | None, counts: list[int]) -> None:
    trace = run(
        _FAMILIES["llada"], gen_length=2 * length, block_length=length, steps_per_block=steps, schedule="ascending"
    )
    for row in range(len(PROMPTS)):
        step_of = trace.step_map_BS[row][trace.canvas.is_completion_BS[row]]
        assert step_of.bincount().tolist() == counts * 2
    assert torch.equal(replayed_logp(_FAMILIES["llada"], trace) < 0, trace.logp_BS < 0)


def test_an_early_eos_counts_as_less_sure() -> None:
    """The factor rises to 1; tokens are drawn as before, only their order changes; 1 is no discount."""
    family, prompts = ending_early(_FAMILIES["llada"], 40), [[row, 3] for row in range(24)]
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8, "steps_per_block": 4}
    plain, none, discounted = (run(family, prompts, eos_discount=eos, **options) for eos in (None, 1.0, 0.01))
    assert torch.equal(plain.step_map_BS, none.step_map_BS)
    assert torch.equal(plain.canvas.input_BS, none.canvas.input_BS)
    steps = []
    for trace in (plain, discounted):
        is_eos_BS = traces.is_eos(trace.canvas.input_BS, family.spec.eos_ids) & (trace.step_map_BS >= 0)
        steps.append(trace.step_map_BS[is_eos_BS].float().mean())
        torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)
    assert steps[1] > steps[0]
    step_B = torch.arange(5)
    assert unmask.progress("even", 5, step_B).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert unmask.progress("ascending", 4, step_B[:4]).tolist() == [1 / 16, 3 / 16, 7 / 16, 15 / 16]
    assert unmask.progress("even", 1, step_B[:1]).tolist() == [1]
    with pytest.raises(ValueError, match="use low_confidence"):
        Decode(unmask="max_prob", eos_discount=0.4)


# --- replay ---


@pytest.mark.parametrize("policy", ["low_confidence", "random", "threshold"])
@pytest.mark.parametrize("name", FAMILIES)
def test_traces_rebuild_what_the_engine_saw_and_score_it_alike(name: str, policy: str) -> None:
    family = ending_early(_FAMILIES[name])
    decode = Decode(**BASE | {"unmask": policy, "temperature": 0.7, "eos_stop": True, "batch_size": 2})
    events: list[StepEvent] = []
    trace = denoise(family, PROMPTS, decode, Key(5), list(range(5)), on_step=events.append)
    seen = [(row, step) for event in events for row, step in zip(event.rows, event.step_N.tolist(), strict=True)]
    assert sorted(seen) == [(row, step) for row in range(5) for step in range(int(trace.nfe_B[row]))]
    is_real_BS, width = trace.canvas.is_real_BS, trace.canvas.length
    for event in events:
        for index, (row, step) in enumerate(zip(event.rows, event.step_N.tolist(), strict=True)):
            is_real_S = is_real_BS[row]
            after_S = traces.canvas_before(trace, step + 1)[row]
            assert torch.equal(event.ids_NS[index, :width][is_real_S], after_S[is_real_S])
            assert torch.equal(event.is_committed_NS[index, :width], trace.step_map_BS[row] == step)
            is_known_S = (trace.step_map_BS[row] >= 0) & (trace.step_map_BS[row] <= step)
            assert torch.equal(event.logp_NS[index, :width], torch.where(is_known_S, trace.logp_BS[row], 0.0))
    assert trace.is_eos_B.any()
    is_tail_BS = trace.canvas.is_completion_BS & ~traces.scored_mask(trace) & (trace.step_map_BS >= 0)
    assert is_tail_BS.any()
    torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)


def test_logp_is_the_networks_own_under_guidance_filters_and_forbidden_tokens() -> None:
    family = ending_early(_FAMILIES["llada"])
    for options in (
        {"cfg_scale": 1.5},
        {"top_k": 3, "top_p": 0.8},
        {"forbid_eos": True},
        {"zero_eos_confidence": True},
    ):
        trace = run(family, **options)
        assert trace.is_exact
        torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_reports_plain_probabilities(name: str) -> None:
    trace = run(_FAMILIES[name], temperature=0.0)
    torch.testing.assert_close(replayed_logp(_FAMILIES[name], trace), trace.logp_BS, atol=1e-4, rtol=0)


def test_shifted_logits_are_read_from_the_position_before() -> None:
    family = copy.copy(_FAMILIES["llada"])
    family.spec = dataclasses.replace(family.spec, is_shifted=True)
    trace = run(family)
    torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)
    assert not torch.equal(trace.canvas.input_BS, run(_FAMILIES["llada"]).canvas.input_BS)


# --- batches ---


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(FAMILIES),
    options=st.sampled_from(
        [
            {},
            {"unmask": "random", "steps_per_block": 2},
            {"unmask": "threshold", "threshold": 0.3, "eos_stop": True},
            {"unmask": "factor", "top_p": 0.9, "eos_stop": True},
        ]
    ),
    order=st.permutations(range(len(PROMPTS))),
    num_rows=st.integers(1, len(PROMPTS)),
    batch_size=st.integers(1, len(PROMPTS)),
)
def test_completions_do_not_depend_on_company(
    name: str, options: dict[str, Any], order: list[int], num_rows: int, batch_size: int
) -> None:
    check_company(ending_early(_FAMILIES[name]), Decode(**BASE | options), order[:num_rows], batch_size)


@settings(max_examples=8, deadline=None)
@given(
    cache=st.sampled_from(["prefix", "dual"]),
    order=st.permutations(range(len(PROMPTS))),
    num_rows=st.integers(1, len(PROMPTS)),
    batch_size=st.integers(1, len(PROMPTS)),
)
def test_approximate_caches_do_not_depend_on_company(
    cache: str, order: list[int], num_rows: int, batch_size: int
) -> None:
    options = {"cache": cache, "unmask": "threshold", "threshold": 0.3, "eos_stop": True}
    check_company(ending_early(_FAMILIES["llada"]), Decode(**BASE | options), order[:num_rows], batch_size)


def check_company(family: Family, decode: Decode, chosen: list[int], batch_size: int) -> None:
    """Some rows in some order and batches give what each of them gives alone."""
    together = denoise(
        family,
        [PROMPTS[row] for row in chosen],
        decode.model_copy(update={"batch_size": batch_size}),
        Key(3),
        [100 + row for row in chosen],
    )
    for row, found in zip(chosen, traces.to_completions(together), strict=True):
        (alone,) = traces.to_completions(denoise(family, [PROMPTS[row]], decode, Key(3), [100 + row]))
        assert (found.tokens, found.step_map, found.nfe) == (alone.tokens, alone.step_map, alone.nfe)
        assert found.logp == pytest.approx(alone.logp, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"unmask": "threshold", "threshold": 0.3}, {"temperature": 0.0}])
def test_the_block_cache_is_exact(options: dict[str, Any]) -> None:
    family = ending_early(_FAMILIES["sdar"])
    cached, recomputed = run(family, **options), run(family, cache="none", **options)
    assert cached.is_exact
    assert torch.equal(cached.canvas.input_BS, recomputed.canvas.input_BS)
    assert torch.equal(cached.step_map_BS, recomputed.step_map_BS)
    assert torch.equal(cached.nfe_B, recomputed.nfe_B)
    torch.testing.assert_close(cached.logp_BS, recomputed.logp_BS, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_that_are_refreshed_at_every_step_are_exact(cache: str) -> None:
    """With one step per block nothing stale is ever read; with more, it is, and the trace says so."""
    exact, cached = run(_FAMILIES["llada"], steps_per_block=1), run(_FAMILIES["llada"], steps_per_block=1, cache=cache)
    assert torch.equal(cached.canvas.input_BS, exact.canvas.input_BS)
    stale = run(_FAMILIES["llada"], cache=cache)
    assert not stale.is_exact
    assert not torch.allclose(stale.logp_BS, run(_FAMILIES["llada"]).logp_BS, atol=1e-3)


# --- stopping ---


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_stop_after_the_block_that_holds_an_eos(name: str) -> None:
    family = ending_early(_FAMILIES[name])
    full, stopped = run(family, eos_stop=False), run(family, eos_stop=True)
    assert stopped.is_eos_B.any()
    assert torch.equal(stopped.is_eos_B, full.is_eos_B)
    assert (stopped.nfe_B < full.nfe_B).any()
    for row in range(len(PROMPTS)):
        is_completion_S, block_S = full.canvas.is_completion_BS[row], full.canvas.block_BS[row]
        is_eos_S = traces.is_eos(full.canvas.input_BS[row], family.spec.eos_ids) & is_completion_S
        last_block = block_S[is_eos_S.int().argmax()] if is_eos_S.any() else block_S[is_completion_S].max()
        num_kept = int(((block_S <= last_block) & full.canvas.is_real_BS[row]).sum())
        assert torch.equal(stopped.canvas.input_BS[row, :num_kept], full.canvas.input_BS[row, :num_kept])
        assert torch.equal(stopped.step_map_BS[row, :num_kept], full.step_map_BS[row, :num_kept])
        beyond = slice(num_kept, int(full.canvas.is_real_BS[row].sum()))
        if family.spec.attention == "full":
            assert (stopped.canvas.input_BS[row, beyond] == family.spec.mask_id).all()
            assert (stopped.step_map_BS[row, beyond] == UNSAMPLED).all()
            assert stopped.canvas.is_completion_BS[row, beyond].all()
        else:
            assert (stopped.canvas.input_BS[row, beyond] == family.spec.pad_id).all()
            assert (stopped.step_map_BS[row, beyond] == GIVEN).all()
            assert not stopped.canvas.is_real_BS[row, beyond].any()
            assert not stopped.canvas.is_completion_BS[row, beyond].any()
    assert traces.to_completions(stopped)[0].tokens == traces.to_completions(full)[0].tokens


def test_only_block_models_stop_by_default() -> None:
    for name, is_stopping in (("llada", False), ("sdar", True)):
        family = ending_early(_FAMILIES[name])
        assert torch.equal(run(family).nfe_B, run(family, eos_stop=is_stopping).nfe_B)
        assert not torch.equal(run(family).nfe_B, run(family, eos_stop=not is_stopping).nfe_B)


def test_an_eos_in_the_prompt_does_not_stop() -> None:
    family = ending_early(_FAMILIES["sdar"], num_eos=1)
    trace = denoise(family, [[1, 2, 3, 4, 10]], Decode(**BASE | {"forbid_eos": True}), Key(0), [0])
    assert int(trace.nfe_B) == int(trace.canvas.is_completion_BS.sum()) == 15
    assert not trace.is_eos_B.any()


# --- tokens ---


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_token_is_never_produced(name: str, temperature: float) -> None:
    family = copy.deepcopy(_FAMILIES[name])
    mask_id = family.spec.mask_id

    def favourites(trace: TraceBatch) -> torch.Tensor:
        logits_BSV = family.logits(traces.canvas_before(trace, 0), trace.canvas.is_real_BS)
        return logits_BSV.argmax(-1)[trace.canvas.is_completion_BS]

    with torch.no_grad():  # what the most frequent favourite gets, the mask token gets twice
        head_VD = family.network.head_weight
        head_VD[mask_id] = 2.0 * head_VD[favourites(run(family)).mode().values]
    trace = run(family, temperature=temperature, eos_stop=False)
    assert not (trace.canvas.input_BS == mask_id).any()
    assert (favourites(trace) == mask_id).float().mean() > 0.2
    assert trace.logp_BS.min() < math.log(1e-3)  # the mask token is in the normaliser


@pytest.mark.parametrize("name", FAMILIES)
def test_forbidden_eos_is_never_produced(name: str) -> None:
    family = ending_early(_FAMILIES[name])
    assert run(family, eos_stop=False).is_eos_B.any()
    trace = run(family, forbid_eos=True)
    assert not trace.is_eos_B.any()
    assert (trace.nfe_B == trace.canvas.is_completion_BS.sum(-1)).all()


def test_sampling_varies_by_sample_and_seed_and_greedy_does_not() -> None:
    prompts = [[1, 2, 3]] * 8
    for family in _FAMILIES.values():
        sampled, again, other = run(family, prompts), run(family, prompts), run(family, prompts, seed=1)
        assert len({tuple(row) for row in sampled.canvas.input_BS.tolist()}) > 4
        assert torch.equal(sampled.canvas.input_BS, again.canvas.input_BS)
        assert sampled.canvas.input_BS.shape != other.canvas.input_BS.shape or not torch.equal(
            sampled.canvas.input_BS, other.canvas.input_BS
        )
        greedy = run(family, prompts, temperature=0.0)
        assert len({tuple(row) for row in greedy.canvas.input_BS.tolist()}) == 1
        assert len({tuple(row) for row in run(family, prompts, unmask="random").step_map_BS.tolist()}) > 1


@pytest.mark.parametrize("unmask", ["low_confidence", "random"])
def test_the_global_generator_is_left_alone(unmask: str) -> None:
    state = torch.get_rng_state()
    first = run(_FAMILIES["sdar"], unmask=unmask)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(run(_FAMILIES["sdar"], unmask=unmask).canvas.input_BS, first.canvas.input_BS)
    torch.set_rng_state(state)


def test_one_token_follows_the_networks_distribution() -> None:
    """Pearson's chi-square over 22 tokens; 46.8 is exceeded once in a thousand keys."""
    family, num = tiny_family("llada"), 20_000
    trace = run(family, [[1, 2, 3]] * num, gen_length=1, block_length=1, batch_size=num, forbid_eos=True)
    probs_V = family.logits(torch.tensor([[1, 2, 3, family.spec.mask_id]]))[0, 3].detach().double().softmax(-1)
    probs_V[[family.spec.mask_id, *family.spec.eos_ids]] = 0.0
    expected_V = num * probs_V / probs_V.sum()
    count_V = torch.bincount(trace.canvas.input_BS[:, 3], minlength=len(probs_V))
    is_possible_V = expected_V > 0
    assert not count_V[~is_possible_V].any()
    chi_square = ((count_V - expected_V) ** 2 / expected_V)[is_possible_V].sum()
    assert chi_square < 46.8


# --- the edges of a call ---


@pytest.mark.parametrize("name", FAMILIES)
def test_empty_prompts_are_completed(name: str) -> None:
    trace = run(_FAMILIES[name], [[], [1, 2]], eos_stop=False)
    assert trace.canvas.is_completion_BS[0].sum() == 12
    assert trace.canvas.input_BS[1, :2].tolist() == [1, 2]
    assert not (trace.canvas.input_BS == trace.mask_id).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_progress_counts_every_position_once(name: str) -> None:
    calls: list[tuple[int, int]] = []
    decode = Decode(**BASE | {"batch_size": 2})
    family = ending_early(_FAMILIES[name])
    denoise(
        family, PROMPTS, decode, Key(0), list(range(5)), on_progress=lambda done, total: calls.append((done, total))
    )
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[0] > 0
    assert done[-1] == totals[0]


def test_what_is_not_finite_is_reported() -> None:
    family = copy.deepcopy(_FAMILIES["sdar"])
    with torch.no_grad():
        family.network.head_weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        run(family)


def test_traces_carry_their_settings() -> None:
    decode = Decode(**BASE)
    trace = denoise(_FAMILIES["llada"], PROMPTS, decode, Key(0), [7, 5, 3, 2, 1], weights_version=4)
    assert trace.sample_id_B.tolist() == [7, 5, 3, 2, 1]
    assert (trace.weights_version, trace.temperature, trace.mask_id) == (4, 1.0, 126)
    assert Decode.model_validate(trace.decode) == decode
    assert not trace.logp_BS.requires_grad
    assert not trace.logp_BS.is_inference()
