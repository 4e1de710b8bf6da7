"""Each diagnosis fires on a run that has the fault, and none on one that has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dare.report.diagnoses import CHECKS, diagnose, trend, unchecked
from dare.report.run_data import RunData
from tests.unit.report_runs import evaluation

HEALTHY: dict[str, Callable[[float], float]] = {
    "reward": lambda done: 0.2 + 0.5 * done,
    "solve_rate": lambda done: 0.1 + 0.5 * done,
    "reward/format": lambda done: 0.9,
    "zero_variance_groups": lambda done: 0.2,
    "commit_nll": lambda done: 0.5 - 0.2 * done,
    "completion_length": lambda done: 40.0 + 5 * done,
    "truncation_rate": lambda done: 0.05,
    "eos_rate": lambda done: 0.95,
    "clip_fraction": lambda done: 0.05,
    "rollout_gap": lambda done: 1e-6,
    "replay_gap": lambda done: 0.0,
    "padding_share": lambda done: 0.1,
}


def make_run(num_steps: int = 100, evaluations: tuple[int, ...] = (20, 60, 110), **changes: Any) -> RunData:
    """`changes` replace curves (functions of the share done), or remove them if None."""
    curves = {name: curve for name, curve in {**HEALTHY, **changes}.items() if curve is not None}
    metrics = [
        {"step": step, **{name: curve(step / num_steps) for name, curve in curves.items()}}
        for step in range(1, num_steps + 1)
    ]
    recipe = {"decode": {"gen_length": 100}, "train": {"updates_per_rollout": 2, "steps": num_steps}}
    held_out = [evaluation(num_steps * i // max(len(evaluations) - 1, 1), n) for i, n in enumerate(evaluations)]
    return RunData(Path("run"), recipe, "", {"status": "finished"}, metrics, [], held_out, [])


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(make_run()) == []
    assert unchecked(make_run()) == []


@pytest.mark.parametrize(
    ("title", "changes"),
    [
        ("The reward is not earned", {"solve_rate": lambda d: 0.02, "reward": lambda d: 0.1 + 0.4 * d}),
        ("The reward is not earned", {"solve_rate": lambda d: 0.3, "reward": lambda d: 0.4 + 0.3 * d}),
        ("Training has not helped", {"solve_rate": lambda d: 0.3, "reward": lambda d: 0.31}),
        ("Many groups teach nothing", {"zero_variance_groups": lambda d: 0.9 * d}),
        ("The policy has lost its variety", {"commit_nll": lambda d: 0.5 * (1 - d) ** 2 + 0.001}),
        ("Completions became much longer", {"completion_length": lambda d: 40 + 50 * d}),
        (
            "Completions became much shorter",
            {"completion_length": lambda d: 40 - 20 * d, "solve_rate": lambda d: 0.5 + d},
        ),
        (
            "Completions end too early",
            {
                "completion_length": lambda d: 40 - 38 * d,
                "solve_rate": lambda d: 0.3 - 0.2 * d,
                "reward": lambda d: 0.3,
            },
        ),
        ("Many completions never end", {"truncation_rate": lambda d: 0.5}),
        ("Clipping never acts", {"clip_fraction": lambda d: 0.0}),
        ("Clipping acts nearly always", {"clip_fraction": lambda d: 0.6 * d}),
        ("Trainer and rollout disagree", {"rollout_gap": lambda d: 0.3 * d}),
        ("The two passes of an update differ", {"replay_gap": lambda d: 0.01}),
        ("Much of every batch is padding", {"padding_share": lambda d: 0.6}),
        ("The model got worse", {"evaluations": (100, 80, 40)}),
        ("The best evaluation is not the last", {"evaluations": (20, 120, 60)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_fault_is_found(title: str, changes: dict[str, Any]) -> None:
    found = [finding for finding in diagnose(make_run(**changes)) if finding.title.startswith(title)]
    assert len(found) == 1
    assert found[0].evidence
    assert any(character.isdigit() for character in found[0].evidence)


def test_clipping_that_cannot_act_is_told_from_clipping_that_does_not() -> None:
    run = make_run(clip_fraction=lambda done: 0.0)
    run.recipe["train"]["updates_per_rollout"] = 1
    assert [finding.title for finding in diagnose(run)] == ["Clipping cannot act"]


def test_problems_come_first() -> None:
    levels = [f.level for f in diagnose(make_run(truncation_rate=lambda d: 0.5, replay_gap=lambda d: 1.0))]
    assert levels == ["problem", "note"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_without_its_numbers_is_listed_and_not_made(check: Any) -> None:
    changes: dict[str, Any] = {"evaluations": ()} if check.needs == ("eval",) else {check.needs[0]: None}
    run = make_run(**changes)
    assert check.name in unchecked(run)
    diagnose(run)
    diagnose(make_run(num_steps=2))
    diagnose(make_run(**{name: lambda done: float("nan") for name in HEALTHY}))


def test_trend_is_the_mean_of_the_first_and_last_tenth() -> None:
    assert trend(make_run(reward=lambda done: done), "reward") == pytest.approx((0.055, 0.955))
