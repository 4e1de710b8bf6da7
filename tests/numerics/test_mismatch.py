"""Trainer against rollout: which targets of any views are states of the rollout, and how far apart both are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dare.core.decode import Decode
from dare.core.recipe import parse_recipe
from dare.core.reward_recipe import RewardRecipe
from dare.core.rng import Key
from dare.core.text import Prompt, Reward
from dare.core.types import Samples, Views
from dare.diffusion.trace import scored_mask, to_completions
from dare.evals.runner import Scored
from dare.families.base import Family
from dare.rewards.mix import RewardMix
from dare.rollout.engine import denoise
from dare.training.mismatch import is_rollout_state, mismatch
from dare.training.online import build_samples
from tests.golden_checkpoints import golden_family

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3]]


def algorithm_of(name: str) -> Any:
    recipe = {"name": "t", "model": {"create": {"family": "llada"}}, "algorithm": name, "task": "chain_sum"}
    return parse_recipe(recipe, where="test").algorithm.build()


def rollout(family: Family, **changes: Any) -> Samples:
    decode = Decode(**{"gen_length": 8, "block_length": 4, "temperature": 0.8, "unmask": "max_prob"} | changes)
    trace = denoise(family, PROMPTS, decode, Key(0), [1, 2, 3, 4])
    scored = [
        Scored(Prompt(uid=str(row), text=""), completion, "", Reward(float(row % 2), row % 2 == 1), [])
        for row, completion in enumerate(to_completions(trace))
    ]
    samples = build_samples(algorithm_of("cj_grpo"), trace, scored, 2, RewardMix(RewardRecipe(), 8))
    assert torch.equal(samples.is_scored_BS, scored_mask(trace))
    return samples


def scores(family: Family, views: Views, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return family.view_logp(views, samples.canvas.rows(views.sample_R))


@pytest.mark.parametrize("algorithm", ["cj_grpo", "tracerl", "justgrpo", "espo", "d1", "coupled_grpo", "wd1", "bgpo"])
@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_what_is_compared_is_the_same_number(name: str, algorithm: str) -> None:
    """Whoever drew the views: wherever they are said to be states of the rollout, both log-probs agree."""
    family = golden_family(name)
    samples = rollout(family)
    views = algorithm_of(algorithm).corrupt(samples, Key(1))
    found = mismatch(scores(family, views, samples), views, samples)
    if algorithm == "cj_grpo":
        assert found["mismatch_share"] == 1.0
    if found:
        assert found["mismatch_max"] < 1e-4
        assert 0.0 <= found["mismatch_kl"] < 1e-8
    is_same_RS, is_full = is_rollout_state(views, samples), name == "llada"
    for view, position in is_same_RS.nonzero().tolist():
        row = int(views.sample_R[view])
        step = int(samples.step_map_BS[row, position])  # type: ignore[index]
        before_S = torch.where(samples.step_map_BS[row] >= step, samples.mask_id, samples.canvas.input_BS[row])  # type: ignore[index]
        is_near_S = samples.canvas.is_real_BS[row]
        if not is_full:
            is_near_S = is_near_S & (samples.canvas.block_BS[row] == samples.canvas.block_BS[row, position])
        assert torch.equal(views.noisy_RS[view][is_near_S], before_S[is_near_S])


def test_a_stale_cache_and_foreign_numbers_show() -> None:
    family = golden_family("llada")
    algorithm = algorithm_of("cj_grpo")
    stale = rollout(family, cache="dual")
    views = algorithm.corrupt(stale, Key(1))
    assert mismatch(scores(family, views, stale), views, stale)["mismatch_kl"] > 1e-6
    samples = rollout(family)
    views = algorithm.corrupt(samples, Key(1))
    logp_RS = scores(family, views, samples)
    assert samples.rollout_logp_BS is not None
    shifted = dataclasses.replace(samples, rollout_logp_BS=samples.rollout_logp_BS - 0.1)
    found = mismatch(logp_RS, views, shifted)
    assert found["mismatch_max"] == pytest.approx(0.1, abs=1e-4)
    assert found["mismatch_kl"] == pytest.approx(0.1**2 / 2, rel=0.1)
    unknown_RS = logp_RS.clone()
    unknown_RS[1:] = torch.nan
    part = mismatch(unknown_RS, views, samples)["mismatch_share"]
    assert part == int(views.is_target_RS[0].sum()) / int(views.is_target_RS.sum())


def test_nothing_is_compared_that_is_not_the_same() -> None:
    family, algorithm = golden_family("llada"), algorithm_of("cj_grpo")
    samples = rollout(family)
    views = algorithm.corrupt(samples, Key(1))
    logp_RS = scores(family, views, samples)
    assert mismatch(logp_RS, dataclasses.replace(views, temperature=1.0), samples) == {}
    assert mismatch(logp_RS, views, dataclasses.replace(samples, is_rewritten=True)) == {}
    assert mismatch(logp_RS, views, dataclasses.replace(samples, rollout_logp_BS=None)) == {}
    noisy_RS = views.noisy_RS.clone()
    noisy_RS[:, 0] = 7  # another prompt
    assert mismatch(logp_RS, dataclasses.replace(views, noisy_RS=noisy_RS), samples) == {}
    assert rollout(family, edit_threshold=0.5, unmask="threshold", threshold=0.3).is_rewritten
    assert rollout(family, remask="rcr", steps_per_block=2).is_rewritten
