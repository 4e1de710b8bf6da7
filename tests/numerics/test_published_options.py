"""Decode options that exist for published samplers: drawn positions, the last time, a stop inside a block."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.types import UNSAMPLED, TraceBatch
from dare.diffusion import trace as traces
from dare.diffusion import unmask
from dare.families.base import Family
from dare.rollout.engine import denoise
from tests.golden_checkpoints import golden_family
from tests.numerics.test_rollout import replayed_logp

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3], [2, 7, 1, 8, 2, 8]]


def run(family: Family, prompts: list[list[int]] = PROMPTS, *, seed: int = 0, **options: Any) -> TraceBatch:
    decode = Decode(**{"gen_length": 12, "block_length": 4, **options})
    return denoise(family, prompts, decode, Key(seed), list(range(len(prompts))))


# --- unmask_temperature (Dream: alg_temp)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_positions_are_drawn_without_replacement(temperature: float) -> None:
    """Every pair of positions, in order, as often as `torch.multinomial` draws it: p_i p_j / (1 - p_i)."""
    score_K = torch.tensor([0.9, 0.5, 0.75, 0.2])
    num = 40_000
    uniform_BK = Key(5).fold("unmask").uniform(torch.arange(num)[:, None], torch.arange(4))
    order_B2 = unmask.drawn_order(score_K.expand(num, 4), temperature, uniform_BK).argsort(-1, descending=True)[:, :2]
    p_K = (score_K.double() / temperature).softmax(-1)
    for first, second in itertools.permutations(range(4), 2):
        expected = float(p_K[first] * p_K[second] / (1 - p_K[first]))
        found = float(((order_B2[:, 0] == first) & (order_B2[:, 1] == second)).double().mean())
        assert abs(found - expected) < 5 * (expected * (1 - expected) / num) ** 0.5 + 1e-4


def test_the_order_is_drawn_from_the_scores_of_the_network() -> None:
    """The first commit of a fresh canvas, over many samples, against softmax(confidence / temperature)."""
    family, temperature, num, prompt = golden_family("dream"), 0.1, 1500, [3, 1, 4, 1, 5]
    canvas = family.empty_canvas([prompt], 6, 6)
    logits_KV = family.logits(canvas.input_BS)[0, len(prompt) :]
    p_K = (logits_KV.softmax(-1).amax(-1).double() / temperature).softmax(-1)
    assert p_K.max() - p_K.min() > 0.05  # otherwise this would say nothing
    decode = Decode(gen_length=6, block_length=6, unmask_temperature=temperature)
    trace = denoise(family, [prompt] * num, decode, Key(1), list(range(num)))
    found_K = (trace.step_map_BS[:, len(prompt) :] == 0).double().mean(0)
    assert ((found_K - p_K).abs() < 5 * (p_K * (1 - p_K) / num).sqrt()).all()


@pytest.mark.parametrize("name", ["dream", "llada", "sdar"])
@pytest.mark.parametrize("policy", ["low_confidence", "max_prob", "entropy", "margin"])
def test_drawn_positions_keep_what_a_rollout_promises(name: str, policy: str) -> None:
    """Schedule, replayed log-probs and independence of the batch; a low temperature is the policy itself."""
    family, options = golden_family(name), {"unmask": policy, "temperature": 1.0}
    trace = run(family, unmask_temperature=0.5, steps_per_block=2, **options)
    is_completion_BS = trace.canvas.is_completion_BS
    assert (trace.step_map_BS[is_completion_BS] >= 0).all()
    torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)
    alone = denoise(
        family,
        PROMPTS[2:3],
        Decode(gen_length=12, block_length=4, unmask_temperature=0.5, steps_per_block=2, **options),
        Key(0),
        [2],
    )
    assert torch.equal(alone.step_map_BS[0], trace.step_map_BS[2, : alone.canvas.length])
    assert torch.equal(alone.canvas.input_BS[0], trace.canvas.input_BS[2, : alone.canvas.length])
    cold, plain = run(family, unmask_temperature=1e-6, **options), run(family, **options)
    assert torch.equal(cold.step_map_BS, plain.step_map_BS)
    assert not torch.equal(run(family, unmask_temperature=5.0, **options).step_map_BS, plain.step_map_BS)


# --- t_min (Dream: eps)


@pytest.mark.parametrize("t_min", [1e-3, 0.05, 0.4])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 12, 20])
def test_counts_follow_the_times(t_min: float, num_steps: int) -> None:
    times = torch.linspace(1.0, t_min, num_steps + 1)
    expected, left = [], 12
    for step in range(num_steps):
        due = int(left * (1 - times[step + 1] / times[step])) if step < num_steps - 1 else left
        expected.append(due)
        left -= due
    trace = run(golden_family("dream"), block_length=12, steps_per_block=num_steps, schedule="timesteps", t_min=t_min)
    step_map_BL = trace.step_map_BS[trace.canvas.is_completion_BS].view(len(PROMPTS), 12)
    for step, count in enumerate(expected):
        assert ((step_map_BL == step).sum(-1) == count).all()


# --- compat: eos_inside_block (LLaDA2.0: eos_early_stop)


def ending_with(family: Family, *eos_ids: int) -> Family:
    other = copy.copy(family)
    other.spec = dataclasses.replace(family.spec, eos_ids=eos_ids)
    return other


def expected_stop(trace: TraceBatch, row: int, eos_id: int) -> int | None:
    """The step after which the published rule leaves: an EOS just committed, nothing masked between prompt and EOS."""
    is_completion_S = trace.canvas.is_completion_BS[row]
    ids_S = trace.canvas.input_BS[row][is_completion_S].tolist()
    step_S = trace.step_map_BS[row][is_completion_S].tolist()
    for step in range(int(trace.nfe_B[row])):
        known = [index for index, (token, when) in enumerate(zip(ids_S, step_S, strict=True)) if when <= step]
        ends = [index for index in known if ids_S[index] == eos_id]
        is_new = any(step_S[index] == step for index in ends)
        if is_new and all(index in known for index in range(ends[0])):
            return step
    return None


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("name", ["llada2_0", "sdar", "llada"])
@pytest.mark.parametrize("options", [{"unmask": "threshold", "threshold": 0.6}, {"unmask": "entropy"}])
def test_a_row_ends_with_its_eos(name: str, cache: str, options: dict[str, Any]) -> None:
    family = golden_family(name)
    whole = run(ending_with(family, 127), cache=cache, **options)
    num_inside = 0
    for eos_id in whole.canvas.input_BS[whole.canvas.is_completion_BS].unique().tolist():
        stopped = run(ending_with(family, eos_id), cache=cache, eos_stop=True, compat=["eos_inside_block"], **options)
        for row in range(len(PROMPTS)):
            step = expected_stop(whole, row, eos_id)
            if step is None:
                continue  # it may still end with a block that holds an EOS after a mask was filled
            assert int(stopped.nfe_B[row]) <= step + 1
            if int(stopped.nfe_B[row]) < step + 1:
                continue
            before = traces.canvas_before(whole, step + 1)[row]
            is_real_S = stopped.canvas.is_real_BS[row]
            assert torch.equal(stopped.canvas.input_BS[row, is_real_S], before[: len(is_real_S)][is_real_S])
            is_left_S = stopped.step_map_BS[row] == UNSAMPLED
            assert (stopped.canvas.input_BS[row, is_left_S] == stopped.mask_id).all()
            is_terminal_S = stopped.canvas.block_BS[row] == stopped.canvas.block_BS[row, is_real_S].max()
            num_inside += bool((is_left_S & is_terminal_S).any())
            completion = traces.to_completions(stopped)[row]
            assert completion.tokens[-1] == eos_id
            assert completion.finish == "eos"
    assert num_inside > 0


def test_what_is_left_of_the_block_does_not_disturb_training() -> None:
    family = ending_with(golden_family("sdar"), *range(10, 60))
    trace = run(family, temperature=1.0, unmask="max_prob", compat=["eos_inside_block"])
    is_left_BS = (trace.step_map_BS == UNSAMPLED) & trace.canvas.is_real_BS
    assert is_left_BS.any()
    assert not (is_left_BS & traces.scored_mask(trace)).any()
    torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"unmask_temperature": 0.1, "unmask": "threshold"}, "unmask_temperature"),
        ({"unmask_temperature": 0.1, "unmask": "left_to_right"}, "unmask_temperature"),
        ({"unmask_temperature": 0.1, "remask": "rcr"}, "unmask_temperature"),
        ({"unmask_temperature": -1.0}, "greater than or equal to 0"),
        ({"t_min": 0.01}, "t_min needs"),
        ({"t_min": 0.0, "schedule": "timesteps"}, "greater than 0"),
        ({"compat": ["eos_inside_block"], "eos_stop": False}, "eos_inside_block"),
        ({"compat": ["eos_inside_block"], "edit_threshold": 0.5}, "eos_inside_block"),
        ({"compat": ["eos_inside_block"], "remask": "rcr"}, "eos_inside_block"),
        ({"compat": ["eos_inside"]}, "compat"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValidationError, match=hint):
        Decode(**options)
