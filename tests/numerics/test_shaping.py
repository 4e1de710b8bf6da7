"""Trained rewards: weighted parts, length shaping, decoupled advantages, groups that count; ratios, clips, anchors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dare.algorithms.agrpo import AGRPO, AGRPOOptions
from dare.algorithms.cj_grpo import CJGRPO, CJGRPOOptions
from dare.algorithms.d1 import D1, D1Options
from dare.algorithms.espo import ESPO, ESPOOptions
from dare.algorithms.policy import PolicyAlgorithm
from dare.algorithms.tracerl import TraceRL, TraceRLOptions
from dare.core.checks import check
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.reward_recipe import GroupRecipe, OverlongRecipe, RewardRecipe
from dare.core.rng import Key
from dare.core.text import Reward
from dare.core.types import Samples, Views
from dare.objectives.advantage import compute_advantages
from dare.rewards.mix import RewardMix, overlong_penalty
from dare.terminal.progress import NullReporter
from dare.training.groups import kept_groups, select_groups
from dare.training.run import train
from tests.numerics import toy
from tests.numerics.records import with_records

# --- reward parts ---


def test_the_overlong_penalty_of_dapo() -> None:
    """0 up to limit - margin, linear, -1 from the limit on."""
    lengths = OverlongRecipe(limit=20, margin=4)
    got = [overlong_penalty(num, lengths) for num in (0, 16, 17, 18, 19, 20, 21, 1000)]
    assert got == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]


def test_parts_and_their_weighted_sum() -> None:
    recipe = RewardRecipe(
        weights={"value": 1.0, "format": 0.5, "finished": 0.25, "brevity": 2.0, "overlong": 4.0},
        overlong=OverlongRecipe(limit=8, margin=4),
    )
    mix = RewardMix(recipe, gen_length=16)
    parts = mix.trained(Reward(0.5, False, {"format": 1.0, "other": 7.0}), 6, is_finished=True)
    assert parts == {"value": 0.5, "format": 1.0, "finished": 1.0, "brevity": 1 - 6 / 16, "overlong": -0.5}
    assert mix.total(parts) == pytest.approx(0.5 + 0.5 + 0.25 + 2 * 0.625 - 2.0)
    unfinished = mix.trained(Reward(0.5, False), 16, is_finished=False)
    assert unfinished == {"value": 0.5, "format": 0.0, "finished": 0.0, "brevity": 0.0, "overlong": -1.0}


@given(value=st.floats(0, 1), num=st.integers(0, 64), is_finished=st.booleans())
def test_the_default_is_the_tasks_own_reward(value: float, num: int, is_finished: bool) -> None:
    mix = RewardMix(RewardRecipe(), gen_length=64)
    assert mix.is_plain
    assert mix.total(mix.trained(Reward(value, False, {"format": 1.0}), num, is_finished=is_finished)) == value


@pytest.mark.parametrize(
    ("section", "bad", "message"),
    [
        (RewardRecipe, {"weights": {}}, "at least 1 item"),
        (RewardRecipe, {"weights": {"value": 0.0}}, "weight of value is 0.0"),
        (RewardRecipe, {"weights": {"value": float("nan")}}, "weight of value is nan"),
        (RewardRecipe, {"weights": {"value": 1.0, "overlong": 1.0}}, "needs both a weight and its lengths"),
        (RewardRecipe, {"overlong": {"limit": 8, "margin": 4}}, "needs both a weight and its lengths"),
        (OverlongRecipe, {"limit": 4, "margin": 8}, "margin 8 is above limit 4"),
        (GroupRecipe, {"min_solve_rate": 0.9, "max_solve_rate": 0.1}, "exchange them"),
        (GroupRecipe, {"oversample": 2}, "set drop_equal"),
    ],
)
def test_impossible_sections_are_refused(section: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**bad)


# --- groups ---

GROUP_B = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
SOLVED_B = torch.tensor([True, True, True, False, False, False, True, False])
ADVANTAGE_B = torch.tensor([0.0, 0.0, 0.5, -0.5, 0.2, -0.2, 0.5, -0.5])


@pytest.mark.parametrize(
    ("options", "num", "expected"),
    [
        ({"drop_equal": True}, 4, [1, 2, 3]),
        ({"drop_equal": True}, 2, [1, 2]),
        ({"min_solve_rate": 0.25}, 4, [0, 1, 3]),
        ({"max_solve_rate": 0.5}, 4, [1, 2, 3]),
        ({"min_solve_rate": 0.5, "max_solve_rate": 0.5}, 4, [1, 3]),
        ({"min_solve_rate": 0.6, "max_solve_rate": 0.9}, 4, []),
    ],
)
def test_which_groups_are_kept(options: dict[str, Any], num: int, expected: list[int]) -> None:
    assert kept_groups(GroupRecipe(**options), ADVANTAGE_B, SOLVED_B, GROUP_B, num) == expected


@settings(max_examples=25, deadline=None)
@given(groups=st.sets(st.integers(0, 3), max_size=4))
def test_selected_groups_keep_their_own_records(groups: set[int]) -> None:
    """Every tensor of a kept sample, its drafts and its tree, under new row numbers."""
    samples = with_records(
        replace(
            toy.make_samples([[0, 2, 1, 0]] * 8, step_maps=[[1, 0, 2, 1]] * 8),
            group_B=GROUP_B,
            advantage_B=ADVANTAGE_B,
            eos_ids=(0,),
        )
    )
    chosen = select_groups(samples, sorted(groups))
    rows = [row for row in range(8) if int(GROUP_B[row]) in groups]
    assert chosen.canvas.batch_size == len(rows)
    assert chosen.sample_id_B.tolist() == [int(samples.sample_id_B[row]) for row in rows]
    assert chosen.advantage_B.tolist() == [float(ADVANTAGE_B[row]) for row in rows]
    assert chosen.drafts is not None
    assert samples.drafts is not None
    for place, row in enumerate(rows):
        own_D, old_D = chosen.drafts.sample_D == place, samples.drafts.sample_D == row
        assert torch.equal(chosen.drafts.seen_DS[own_D], samples.drafts.seen_DS[old_D])
        assert torch.equal(chosen.drafts.reward_D[own_D], samples.drafts.reward_D[old_D])
    tree, old = chosen.tree, samples.tree
    assert tree is not None
    assert old is not None
    assert int(tree.is_leaf_N.sum()) == len(rows)
    is_child_N = tree.parent_N >= 0
    parent_sample = tree.sample_N[tree.parent_N[is_child_N]]
    assert torch.equal(chosen.group_B[parent_sample], chosen.group_B[tree.sample_N[is_child_N]])


# --- decoupled advantages ---


def test_decoupled_parts_do_not_drown_one_another() -> None:
    """Two rewards of spreads 1 and 0.01: normalised together the small one vanishes, apart it counts as much."""
    group_B = torch.zeros(4, dtype=torch.int64)
    large_B, small_B = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.01, 0.01, 0.0, 0.0])
    together_B = compute_advantages("zpop", large_B + small_B, group_B)
    apart_B = compute_advantages("zpop", large_B, group_B) + compute_advantages("zpop", small_B, group_B)
    assert float(together_B[0] - together_B[2]) == pytest.approx(0.02, abs=1e-3)
    assert apart_B.tolist() == pytest.approx([2.0, 0.0, 0.0, -2.0], abs=1e-6)


def tiny_recipe(model: Path, algorithm: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "shaping",
        "model": {"path": str(model)},
        "algorithm": algorithm or {"name": "d1", "beta": 0.0},
        "task": {
            "name": "countdown",
            "operators": "+-",
            "is_compact": True,
            "max_value": 15,
            "train_size": 32,
            "eval_size": 8,
        },
        "decode": {
            "gen_length": 16,
            "block_length": 16,
            "steps_per_block": 1,
            "unmask": "max_prob",
            "temperature": 1.0,
        },
        "train": {"steps": 2, "prompts_per_step": 2, "completions_per_prompt": 8},
        "evaluation": {"num": 4, "at_start": False},
        **sections,
    }
    return parse_recipe(data, where="test")


def metrics_of(recipe: Recipe, out: Path) -> list[dict[str, float]]:
    check(recipe)
    train(recipe, out, NullReporter())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_shaped_reward_is_what_is_trained(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A random model solves nothing, so only the shaping can move it."""
    model = tiny_checkpoints["llada"]
    plain = metrics_of(tiny_recipe(model), tmp_path / "plain")
    assert "trained_reward" not in plain[0]
    reward = {"weights": {"value": 1.0, "brevity": 1.0}}
    for combine in ("sum", "decoupled"):
        shaped = metrics_of(tiny_recipe(model, reward={**reward, "combine": combine}), tmp_path / combine)
        assert shaped[0]["trained_reward"] > plain[0]["reward"]
        assert shaped[0]["reward"] == plain[0]["reward"]
        assert shaped[0]["grad_norm"] > 0
    for name in ("mdpo", "dtreerpo", "tracerl_value"):
        with pytest.raises(DareError, match="whole rewards"):
            check(tiny_recipe(model, {"name": name}, reward={**reward, "combine": "decoupled"}))
    shaped = metrics_of(tiny_recipe(model, {"name": "mdpo", "beta": 0.0}, reward=reward), tmp_path / "mdpo")
    assert shaped[0]["grad_norm"] > 0


def test_groups_that_teach_nothing_are_left_out(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With four times the prompts, groups that differ are found; if none is kept, no update is made."""
    model = tiny_checkpoints["llada"]
    reward = {"weights": {"brevity": 1.0}}
    kept = metrics_of(
        tiny_recipe(model, reward=reward, groups={"drop_equal": True, "oversample": 4}), tmp_path / "kept"
    )
    assert all(0 < line["kept_groups"] <= 0.25 and line["grad_norm"] > 0 for line in kept)
    none = metrics_of(tiny_recipe(model, reward=reward, groups={"min_solve_rate": 1.0}), tmp_path / "none")
    assert all(line["kept_groups"] == 0.0 and "loss" not in line for line in none)
    start, end = (path.read_bytes() for path in (model / "model.safetensors", _last(tmp_path / "none")))
    assert start == end


def _last(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors"


def test_the_sections_that_the_docs_show_are_a_recipe(tiny_checkpoints: dict[str, Path]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    sections = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    recipe = tiny_recipe(tiny_checkpoints["llada"], **sections)
    assert recipe.groups.is_filtering
    check(recipe)


def test_an_unknown_part_stops_the_run_before_it_starts(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_checkpoints["llada"], reward={"weights": {"value": 1.0, "fromat": 1.0}})
    with pytest.raises(DareError, match="'fromat'") as caught:
        train(recipe, tmp_path / "run", NullReporter())
    assert "format" in str(caught.value)
    with pytest.raises(DareError, match="no rewards"):
        check(tiny_recipe(tiny_checkpoints["llada"], {"name": "sft"}, groups={"drop_equal": True}))


# --- ratios, clips, anchors ---

TRACE: list[tuple[Any, Any]] = [(CJGRPO, CJGRPOOptions), (TraceRL, TraceRLOptions), (AGRPO, AGRPOOptions)]


def two_samples() -> Samples:
    return toy.make_samples(
        [[0, 2, 1, 0], [1, 1, 2]], step_maps=[[1, 0, 2, 1], [0, 1, 1]], advantages=[1.0, -0.5], sample_ids=[0, 1]
    )


def loss_and_grad(
    algorithm: PolicyAlgorithm[Any], new_RS: Tensor, old_RS: Tensor, views: Views, samples: Samples
) -> tuple[float, Tensor]:
    leaf = new_RS.clone().requires_grad_()
    loss = algorithm.loss(leaf, old_RS, None, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, leaf)
    return float(loss.value.detach()), grad_RS


@pytest.mark.parametrize("plugin", TRACE)
def test_ratios_of_tokens_steps_and_sequences_agree_on_policy(plugin: Any) -> None:
    kind, options = plugin
    samples = two_samples()
    views = kind(options()).corrupt(samples, Key(0))
    old_RS = toy.view_logp(views, samples.canvas)
    grads = [
        loss_and_grad(kind(options(beta=0.0, ratio=ratio)), old_RS, old_RS, views, samples)[1]
        for ratio in ("token", "step", "sequence")
    ]
    if kind is not AGRPO:  # its steps have weights of their own, so a mean over several steps is another estimate
        torch.testing.assert_close(grads[2], grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_step_and_sequence_ratios_are_geometric_means() -> None:
    samples = two_samples()
    algorithm = {ratio: CJGRPO(CJGRPOOptions(beta=0.0, ratio=ratio)) for ratio in ("token", "step", "sequence")}
    views = algorithm["token"].corrupt(samples, Key(0))
    log_ratio_RS = torch.where(views.is_target_RS, torch.arange(views.is_target_RS.numel()).reshape(
        views.is_target_RS.shape).double() / 100, 0.0)  # fmt: skip
    got = {ratio: one.log_ratio(log_ratio_RS, views) for ratio, one in algorithm.items()}
    assert torch.equal(got["token"], log_ratio_RS)
    for row in range(views.num_views):
        own_S = views.is_target_RS[row]
        assert got["step"][row][own_S].tolist() == pytest.approx(
            [float(log_ratio_RS[row][own_S].mean())] * int(own_S.sum())
        )
        is_sample_R = views.sample_R == views.sample_R[row]
        mean = float(log_ratio_RS[is_sample_R][views.is_target_RS[is_sample_R]].mean())
        assert got["sequence"][row][own_S].tolist() == pytest.approx([mean] * int(own_S.sum()))


@pytest.mark.parametrize(("preset", "low", "high"), [("clip_higher", 0.2, 0.28), ("gspo", 3e-4, 4e-4)])
def test_clip_presets_are_their_intervals(preset: Any, low: float, high: float) -> None:
    samples = two_samples()
    plugins: list[tuple[Any, Any]] = [(D1, D1Options), (ESPO, ESPOOptions), (CJGRPO, CJGRPOOptions)]
    for kind, options in plugins:
        named = kind(options(beta=0.0, eps=0.9, eps_high=0.9, clip=preset))
        explicit = kind(options(beta=0.0, eps=low, eps_high=high))
        views = named.corrupt(samples, Key(0))
        old_RS = toy.view_logp(views, samples.canvas, toy.OLD)
        # Ratios of 1.25 where the advantage is positive and of 0.76 where it is negative lie between 0.2 and 0.28.
        moved_R1 = torch.where(samples.advantage_B > 0, 0.22, -0.27)[views.sample_R, None]
        new_RS = old_RS + moved_R1 * views.is_target_RS
        (value, grad_RS), (expected, expected_RS) = (
            loss_and_grad(algorithm, new_RS, old_RS, views, samples) for algorithm in (named, explicit)
        )
        assert value == expected
        assert torch.equal(grad_RS, expected_RS)
        if kind is not ESPO:  # whose masks weigh the same move by how many tokens they happen to hide
            is_moved_B = [bool((grad_RS[views.sample_R == row] != 0).any()) for row in range(2)]
            assert is_moved_B == [high > 0.22, False]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_goes_to_the_named_policy(estimator: Any) -> None:
    """Zero advantages leave the KL alone: its gradient is that of the estimator at the difference to the anchor."""
    samples = two_samples()
    samples.advantage_B.zero_()
    slopes: dict[str, Callable[[Tensor], Tensor]] = {
        "k1": torch.ones_like,
        "k2": lambda d: d,
        "k3": lambda d: 1 - torch.exp(-d),
    }
    recorded_BS = torch.full(samples.canvas.input_BS.shape, -1.5)
    samples.rollout_logp_BS = recorded_BS
    for kl_to in ("reference", "old", "rollout"):
        algorithm = CJGRPO(CJGRPOOptions(beta=0.5, kl=estimator, kl_to=kl_to))
        assert algorithm.needs_reference == (kl_to == "reference")
        views = algorithm.corrupt(samples, Key(0))
        new_RS, old_RS, reference_RS = (
            toy.view_logp(views, samples.canvas, theta) for theta in (toy.NEW, toy.OLD, toy.REFERENCE)
        )
        leaf = new_RS.clone().requires_grad_()
        loss = algorithm.loss(leaf, old_RS, reference_RS, views, samples)
        (grad_RS,) = torch.autograd.grad(loss.value, leaf)
        recorded_RS = recorded_BS[views.sample_R].double()
        anchor_RS = {"reference": reference_RS, "old": old_RS, "rollout": recorded_RS}[kl_to]
        expected_RS = 0.5 * slopes[estimator](new_RS - anchor_RS) * views.is_target_RS / views.is_target_RS.sum()
        torch.testing.assert_close(grad_RS, expected_RS)


def test_a_kl_to_the_rollout_is_refused_where_nothing_was_recorded() -> None:
    with pytest.raises(DareError, match="what it recorded at each commit"):
        D1(D1Options(kl_to="rollout")).check_rollouts(Decode())
    with pytest.raises(DareError, match="shrink"):
        TraceRL(TraceRLOptions(kl_to="rollout", shrink=2)).check_rollouts(Decode())
    with pytest.raises(DareError, match="not those"):
        CJGRPO(CJGRPOOptions(kl_to="rollout")).check_rollouts(Decode(cache="dual"))
    CJGRPO(CJGRPOOptions(kl_to="rollout")).check_rollouts(Decode())
