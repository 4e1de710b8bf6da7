"""Every algorithm on every family: a real rollout, its rewards, two updates. What the matrix says works, works."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dare.algorithms.policy import PolicyAlgorithm
from dare.core.checks import check, check_attention
from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.registry import ALGORITHMS, FAMILIES, resolve
from dare.core.reward_recipe import RewardRecipe
from dare.core.rng import Key
from dare.core.text import Completion, Prompt, Reward
from dare.core.types import Drafts, Samples, TraceBatch
from dare.diffusion.trace import draft_tokens, to_completions
from dare.evals.runner import Scored
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.rewards.mix import RewardMix
from dare.training.groups import select_groups
from dare.training.online import build_samples
from dare.training.update import plan_iterations, update
from tests.conftest import tiny_family

GROUP = 4
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
ONLINE = [name for name in ALGORITHMS if resolve("algorithms", name).kind == "online"]
DECODE = {"gen_length": 8, "block_length": 4, "steps_per_block": 2, "unmask": "max_prob", "temperature": 1.0}
LEFT_TO_RIGHT = {**DECODE, "steps_per_block": 4, "unmask": "left_to_right"}
FEW_VIEWS: dict[str, dict[str, Any]] = {"bgpo": {"num_mc": 2}, "ebpo": {"num_mc": 2}}
NEEDED: dict[str, dict[str, Any]] = {"trace_sft": {"min_reward": 0.4}}  # some of the samples are good enough


@pytest.fixture(scope="module")
def every_family() -> dict[str, Family]:
    return {name: tiny_family(name) for name in FAMILIES}


def recipe_of(name: str, family_name: str, **options: Any) -> Recipe:
    decode = LEFT_TO_RIGHT if name == "justgrpo" else DECODE
    return parse_recipe(
        {
            "name": "pair",
            "model": {"create": {"family": family_name, "block_length": 4}},
            "algorithm": {"name": name, **NEEDED.get(name, {}), **options},
            "task": "countdown",
            "decode": decode,
            "train": {"completions_per_prompt": GROUP, "updates_per_rollout": 2, "micro_batch_views": 7},
            "optimizer": {"lr": 1e-3},
        },
        where="test",
    )


def reward_of(tokens: list[int]) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1)


def scored_of(completion: Completion) -> Scored:
    return Scored(Prompt("test/train/0", text=""), completion, "", Reward(reward_of(completion.tokens), False), [])


def judged(drafts: Drafts, trace: TraceBatch) -> Drafts:
    return replace(drafts, reward_D=torch.tensor([reward_of(tokens) for tokens in draft_tokens(drafts, trace)]))


def rollout(engine: LocalEngine, recipe: Recipe, groups: tuple[int, ...] = (0, 1)) -> Samples:
    algorithm = recipe.algorithm.build()
    prompts = [PROMPTS[group] for group in groups for _ in range(GROUP)]
    trace = engine.generate(
        prompts,
        recipe.decode,
        Key(3),
        [GROUP * group + row for group in groups for row in range(GROUP)],
        has_drafts="drafts" in algorithm.needs,
        branching=algorithm.branching(GROUP),
    )
    if trace.drafts is not None:
        trace = replace(trace, drafts=judged(trace.drafts, trace))
    scored = [scored_of(completion) for completion in to_completions(trace)]
    samples = build_samples(algorithm, trace, scored, GROUP, RewardMix(RewardRecipe(), recipe.decode.gen_length))
    return replace(samples, progress=0.5)


@pytest.mark.parametrize("family_name", list(FAMILIES))
@pytest.mark.parametrize("name", ONLINE)
def test_a_pair_rolls_out_and_updates(every_family: dict[str, Family], name: str, family_name: str) -> None:
    """Finite losses, gradients that move the weights, a first update at ratio 1, and both passes in agreement."""
    family = copy.deepcopy(every_family[family_name])
    recipe = recipe_of(name, family_name)
    algorithm = recipe.algorithm.build()
    attention = family.spec.attention
    if attention in algorithm.forbidden:
        with pytest.raises(DareError, match="cannot train this family"):
            check(recipe)
        return
    check(recipe)
    check_attention(name, algorithm, attention)
    engine = LocalEngine(
        recipe, family, num_updates=2, needs_reference=algorithm.needs_reference, critic_lr=algorithm.critic_lr
    )
    samples = rollout(engine, recipe)
    assert float(samples.advantage_B.abs().max()) > 0
    before = {key: value.clone() for key, value in family.network.state_dict().items()}
    rows = [update(engine, algorithm, samples, one) for one in plan_iterations(engine, algorithm, samples, Key(4), 2)]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["grad_norm"] > 0
        assert row["replay_gap"] < 1e-4
    if "ratio" in rows[0]:
        assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert rows[0]["clip_fraction"] == 0.0
    after = family.network.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("name", ONLINE)
def test_a_group_that_is_kept_trains_as_if_alone(every_family: dict[str, Family], name: str, family_name: str) -> None:
    """Filtered out of a rollout of two groups, with its drafts and tree, or rolled out by itself: the same step."""
    recipe = recipe_of(name, family_name, **FEW_VIEWS.get(name, {}))
    algorithm = recipe.algorithm.build()
    results = []
    for groups in ((0, 1), (1,)):
        family = copy.deepcopy(every_family[family_name])
        engine = LocalEngine(
            recipe, family, num_updates=1, needs_reference=algorithm.needs_reference, critic_lr=algorithm.critic_lr
        )
        samples = rollout(engine, recipe, groups)
        if len(groups) == 2:
            samples = select_groups(samples, [1])
        (plan,) = plan_iterations(engine, algorithm, samples, Key(4), 1)
        results.append(update(engine, algorithm, samples, plan))
    kept, alone = results
    assert kept["loss"] == pytest.approx(alone["loss"], rel=1e-4, abs=1e-6)
    assert kept["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("name", ONLINE)
def test_completions_above_the_mean_become_likelier(
    every_family: dict[str, Family], name: str, family_name: str
) -> None:
    """The direction of the step: six updates on one rollout favour its better samples."""
    family = copy.deepcopy(every_family[family_name])
    recipe = recipe_of(name, family_name, **FEW_VIEWS.get(name, {}))
    algorithm = recipe.algorithm.build()
    engine = LocalEngine(
        recipe, family, num_updates=6, needs_reference=algorithm.needs_reference, critic_lr=algorithm.critic_lr
    )
    samples = rollout(engine, recipe)
    judge = resolve("algorithms", "sft")
    views = judge(judge.Config(views_per_sample=8)).corrupt(samples, Key(9))

    def contrast() -> float:
        """Advantage-weighted mean log-prob of the tokens of random masks: what every algorithm wants larger."""
        logp_RS = engine.score(views, samples)
        mean_R = logp_RS.sum(-1) / views.is_target_RS.sum(-1).clamp(min=1)
        return float((samples.advantage_B[views.sample_R] * mean_R).sum())

    before = contrast()
    for index in range(6):
        (plan,) = plan_iterations(engine, algorithm, samples, Key(index), 1)
        update(engine, algorithm, samples, plan)
    assert contrast() > before


RATIO = [name for name in ONLINE if issubclass(resolve("algorithms", name), PolicyAlgorithm)]


@pytest.mark.parametrize("name", RATIO)
def test_a_kl_to_the_old_policy_starts_at_nothing(every_family: dict[str, Family], name: str) -> None:
    """It needs no reference, and neither its value nor its gradient shows before the policy has moved."""
    results = []
    for options in ({"beta": 0.5, "kl": "k3", "kl_to": "old"}, {"beta": 0.0}):
        recipe = recipe_of(name, "sdar", **FEW_VIEWS.get(name, {}), **options)
        algorithm = recipe.algorithm.build()
        assert not algorithm.needs_reference
        family = copy.deepcopy(every_family["sdar"])
        engine = LocalEngine(recipe, family, num_updates=2, needs_reference=False, critic_lr=algorithm.critic_lr)
        samples = rollout(engine, recipe)
        plans = plan_iterations(engine, algorithm, samples, Key(4), 2)
        results.append([update(engine, algorithm, samples, plan) for plan in plans])
    (first, second), (plain, _) = results
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert second["kl"] > 0
