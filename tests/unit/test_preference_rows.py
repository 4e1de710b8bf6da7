"""Preferences as users have them: pairs, good and bad completions, a task's own; and the rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.data.rows import PairRow
from dare.tasks.chain_sum import ChainSum
from dare.terminal.progress import NullReporter
from dare.training.pairs import task_pairs
from dare.training.run import train

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}.", "rejected": f"{2 * i + 1}."} for i in range(1, 9)]
LABELLED = [{"prompt": f"{i}+1=", "completion": f"{i + 1}.", "label": i % 3 != 0} for i in range(1, 9)]


def recipe_of(path: Path, algorithm: str, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "model": {
                "create": {"family": "sdar", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "block_length": 4}
            },
            "algorithm": algorithm,
            "data": {"path": str(path), **data},
            "decode": {"gen_length": 8},
            "train": {"steps": 2, "batch_size": 4},
        },
        where="test",
    )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe: Recipe, out: Path) -> list[dict[str, float]]:
    train(recipe, out, NullReporter())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["vrpo", "dpo", "ipo", "kto", "dtrpo"])
def test_pairs_train_every_preference_algorithm(algorithm: str, tmp_path: Path) -> None:
    lines = run(recipe_of(write(tmp_path / "pairs.jsonl", PAIRS), algorithm), tmp_path / "run")
    assert lines[0]["reward_accuracy"] == 0.5
    assert lines[0]["chosen_reward"] == 0.0
    assert lines[1]["chosen_reward"] != 0.0


@pytest.mark.parametrize("algorithm", ["vrpo", "dpo", "ipo", "kto", "dtrpo"])
def test_reward_accuracy_rises(algorithm: str, tmp_path: Path) -> None:
    """Over the last ten steps, 80 pairs of fresh draws: chance is 0.5 with a standard deviation of 0.056."""
    recipe = recipe_of(write(tmp_path / "pairs.jsonl", PAIRS), algorithm)
    changes = {
        "train": recipe.train.model_copy(update={"steps": 30, "batch_size": 8}),
        "optimizer": recipe.optimizer.model_copy(update={"lr": 2e-2}),
    }
    lines = run(recipe.model_copy(update=changes), tmp_path / "run")
    last = lines[-10:]
    assert sum(line["reward_accuracy"] for line in last) / len(last) > 0.67
    assert sum(line["chosen_reward"] - line["rejected_reward"] for line in last) > 0


def test_good_and_bad_completions_need_no_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "labelled.jsonl", LABELLED)
    lines = run(recipe_of(path, "kto"), tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(0.5)
    with pytest.raises(DareError, match="the row is no pair") as error:
        run(recipe_of(path, "dpo"), tmp_path / "other")
    assert "labelled.jsonl, line 1" in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "row", "message"),
    [
        ("dpo", {"prompt": "1+1=", "chosen": "2.", "rejected": "2."}, "chosen and rejected are equal"),
        ("dpo", {"prompt": "1+1=", "chosen": "2."}, "rejected"),
        ("kto", {"prompt": "1+1=", "chosen": "", "rejected": "2."}, "empty"),
        ("sft", {"prompt": "1+1=", "chosen": "2.", "rejected": "3."}, "pair of completions"),
    ],
)
def test_a_bad_row_is_named_by_its_line_or_skipped(
    algorithm: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [*PAIRS, row])
    with pytest.raises(DareError, match=message) as error:
        run(recipe_of(path, algorithm), tmp_path / "run")
    assert f"line {len(PAIRS) + 1 if algorithm != 'sft' else 1}" in str(error.value)
    if algorithm != "sft":
        assert len(run(recipe_of(path, algorithm, on_bad_row="skip"), tmp_path / "skipped")) == 2


@pytest.mark.parametrize("label", [None, "good", 2])
def test_a_label_is_true_or_false(label: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*LABELLED, {"prompt": "3+3=", "completion": "6.", "label": label}])
    with pytest.raises(DareError, match="whether its completion is good") as error:
        run(recipe_of(path, "kto"), tmp_path / "run")
    assert "line 9" in str(error.value)
    assert len(run(recipe_of(path, "kto", on_bad_row="skip"), tmp_path / "skipped")) == 2


def test_a_tasks_pairs_are_a_right_and_a_wrong_answer() -> None:
    task = ChainSum(ChainSum.Config(train_size=20), 3)
    pairs = task_pairs(task)
    assert len(pairs) == 20
    for index, pair in enumerate(pairs):
        assert isinstance(pair, PairRow)
        prompt = task.prompt("train", index)
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        assert task.reward(prompt, pair.chosen).is_solved
        assert not task.reward(prompt, pair.rejected).is_solved
