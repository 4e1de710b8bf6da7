"""Problems from a user's data: splits, scorers, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.core.recipe import TaskChoice
from dare.core.text import Prompt, Reward
from dare.rewards.answers import exact, last_number, number
from dare.tasks.base import Task


def build(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl", **options: Any) -> Task[Any]:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskChoice.model_validate({"name": "rows", "path": str(path), "eval_size": 2, **options}).build(0)


def prompts(task: Task[Any], split: str) -> set[str]:
    return {str(task.prompt(split, index).text) for index in range(task.size(split))}


ROWS = [{"prompt": f"p{i}", "answer": str(i), "level": i % 3} for i in range(6)]


def test_held_out_rows_are_never_trained_even_if_they_come_twice(tmp_path: Path) -> None:
    task = build(tmp_path, ROWS + ROWS)
    assert (task.size("train"), task.size("eval")) == (4, 2)
    assert prompts(task, "train") | prompts(task, "eval") == {row["prompt"] for row in ROWS}
    assert not prompts(task, "train") & prompts(task, "eval")
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    task = build(tmp_path, ROWS, eval_path=str(held_out))
    assert prompts(task, "train") == {"p3", "p4", "p5"}  # also those of the file that eval_size leaves out
    assert task.size("eval") == 2
    with pytest.raises(DareError, match="no row is left to train on"):
        build(tmp_path, ROWS, eval_size=6).size("train")


def test_scorers_see_the_answer_and_all_columns(tmp_path: Path) -> None:
    task = build(tmp_path, ROWS)
    prompt = task.prompt("train", 0)
    assert prompt.meta["level"] == int(prompt.answer or "") % 3
    assert task.reward(prompt, f" {prompt.answer}\n").is_solved
    assert not task.reward(prompt, "7").is_solved
    task = build(tmp_path, ROWS, scorer=f"{__name__}:half_if_level_is_said")
    assert task.reward(prompt, f"level {prompt.meta['level']}") == Reward(0.5, False)


def test_nested_columns_become_chats(tmp_path: Path) -> None:
    rows = [{"q": {"text": f"hi{i}"}, "key": i} for i in range(4)]
    columns = {"prompt": "q.text", "answer": "key"}
    task = build(tmp_path, rows, columns=columns, scorer="number", is_chat=True, system="be brief")
    prompt = task.prompt("train", 0)
    assert prompt.messages is not None
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert prompt.messages[1]["content"] == f"hi{prompt.answer}"


def half_if_level_is_said(prompt: Prompt, completion: str) -> float:
    return 0.5 * (str(prompt.meta["level"]) in completion)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "exakt"}, "did you mean 'exact'"),
        ({"scorer": "no_such_module:f"}, "cannot import"),
        ({"columns": {"prompt": "promt"}}, "did you mean 'prompt'"),
        ({"columns": {"prompt": "prompt.text"}}, "unknown column"),
        ({"columns": {"answer": "level"}, "scorer": "exact"}, None),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    task = build(tmp_path, ROWS, **options)
    if message is None:
        assert task.reward(task.prompt("train", 0), str(task.prompt("train", 0).answer)).is_solved
        return
    with pytest.raises(DareError, match=message):
        task.reward(task.prompt("train", 0), "1")


def test_rows_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    with pytest.raises(DareError, match=r"has no answer[\s\S]*map the column") as error:
        build(tmp_path, [*ROWS, {"prompt": "q"}]).size("train")
    assert "rows.jsonl, line 7" in str(error.value)
    with pytest.raises(DareError, match="holds no number"):
        build(tmp_path, [*ROWS, {"prompt": "q", "answer": "none"}], scorer="number").size("train")


# Scorers


@pytest.mark.parametrize(
    ("answer", "completion", "is_right"),
    [
        ("#### 1,200", "so it is 1200.", True),
        ("#### 1,200", "1,200.00 dollars", True),
        ("72", "#### 72", True),
        ("72", "72 of 73", False),
        ("-3", "5-3=-3", True),
        ("2", "5-3=2", True),
        ("3", "5-3", True),  # a minus between numbers is no sign
        ("0.5", ".5", False),
        ("5", "five", False),
        ("5", "\u0665", False),
        ("5", "5" * 10_000, False),
        ("5", "", False),
    ],
)
def test_the_last_number_counts(answer: str, completion: str, is_right: bool) -> None:
    reward = number(answer, completion)
    assert (reward.is_solved, reward.value) == (is_right, float(is_right))


@given(st.text())
def test_no_text_breaks_a_scorer(text: str) -> None:
    for reward in (exact("5", text), number("5", text)):
        assert reward.value in (0.0, 1.0)


@given(value=st.integers(-(10**9), 10**9), before=st.sampled_from(["", "x ", "#### ", "= "]))
def test_numbers_are_read_as_they_are_written(value: int, before: str) -> None:
    assert last_number(f"{before}{value}") == value
    assert last_number(f"{before}{value:,}.") == value
