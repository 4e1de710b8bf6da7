"""Tasks: reproducible problems, splits that never meet, rewards that cannot be talked into anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.core.recipe import TaskChoice
from dare.core.registry import TASKS
from dare.core.text import Prompt
from dare.tasks.base import Task
from dare.tasks.countdown import Countdown
from dare.tasks.mini_sudoku import MiniSudoku

SMALL = {"train_size": 60, "eval_size": 20}
PROBLEMS = Path(__file__).parents[1] / "golden" / "rows" / "problems.jsonl"
TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "countdown": SMALL,
    "chain_sum": SMALL,
    "mini_sudoku": SMALL,
    "reasoning_gym": {**SMALL, "dataset": "spell_backward"},
    "rows": {**SMALL, "path": str(PROBLEMS), "columns": {"prompt": "question"}, "scorer": "number"},
}
COMPACT = ["countdown", "chain_sum", "mini_sudoku"]
HOSTILE = [
    "",
    " \n\t",
    "9**9**9**9",
    "9" * 1_000_000,
    "1" + "0" * 9,
    "(" * 100_000,
    "\u0661\u0664",
    "\uff11\uff14",
    "1" * 16,
    "1234",
    "nan",
    "inf",
    "1e400",
    "Decimal('14')",
    "__import__('os').system('true')",
    "\x00",
    "\ud800",
    "<answer>",
    "\U0001d7d9" * 16,
]


def make(name: str, seed: int = 0, **options: Any) -> Task[Any]:
    task: Task[Any] = TaskChoice.model_validate({"name": name, **TASK_OPTIONS[name], **options}).build(seed)
    return task


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task[Any]]:
    return {name: make(name) for name in COMPACT}


def texts(task: Task[Any], split: str) -> list[str]:
    return [task.prompt(split, index).text or "" for index in range(task.size(split))]


def test_every_table_row_is_tested() -> None:
    assert {*TASK_OPTIONS, "benchmark"} == set(
        TASKS
    )  # a benchmark needs data files: tests/evals/test_benchmark_task.py


@pytest.mark.parametrize("name", TASK_OPTIONS)
def test_prompt_is_a_pure_function_of_its_index(name: str) -> None:
    task, other = make(name), make(name)
    forwards = [task.prompt("train", index) for index in range(10)]
    backwards = [other.prompt("train", index) for index in reversed(range(10))][::-1]
    assert [(p.uid, p.text, p.answer) for p in forwards] == [(p.uid, p.text, p.answer) for p in backwards]
    assert forwards[7].uid.endswith("/train/7")
    assert len({prompt.uid for prompt in forwards}) == 10


@pytest.mark.parametrize("name", TASK_OPTIONS)
def test_train_follows_the_seed_and_eval_does_not(name: str) -> None:
    task, other = make(name, seed=0), make(name, seed=1)
    assert texts(task, "eval") == texts(other, "eval")
    assert texts(task, "train") != texts(other, "train")
    assert texts(task, "eval") != texts(make(name, eval_seed=5), "eval")


@pytest.mark.parametrize("name", TASK_OPTIONS)
def test_eval_problems_are_distinct_and_a_smaller_split_is_a_prefix(name: str) -> None:
    large = texts(make(name), "eval")
    assert len(set(large)) == 20
    assert texts(make(name, eval_size=7), "eval") == large[:7]


@pytest.mark.parametrize("name", COMPACT)
def test_answers_solve_within_the_alphabet(name: str, tasks: dict[str, Task[Any]]) -> None:
    task = tasks[name]
    for split in ("train", "eval"):
        for index in range(20):
            prompt = task.prompt(split, index)
            assert prompt.answer is not None
            assert set((prompt.text or "") + prompt.answer) <= set(task.alphabet)
            reward = task.reward(prompt, prompt.answer)
            assert reward.is_solved
            assert reward.value == 1.0
            assert task.reward(prompt, f" {prompt.answer}\n").is_solved


@pytest.mark.slow
def test_same_problems_in_another_process() -> None:
    """Also with another hash seed."""
    code = (
        "import json, sys; from dare.core.recipe import TaskChoice; "
        "print(json.dumps([[t.prompt(s, i).text for s in ('train', 'eval') for i in range(5)] for t in "
        "[TaskChoice.model_validate(d).build(3) for d in json.loads(sys.argv[1])]])); "
        "assert 'torch' not in sys.modules"
    )
    choices = [{"name": name, **SMALL} for name in COMPACT]
    output = subprocess.run(
        [sys.executable, "-c", code, json.dumps(choices)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
    )
    own = [[make(n, seed=3).prompt(s, i).text for s in ("train", "eval") for i in range(5)] for n in COMPACT]
    assert json.loads(output.stdout) == own


def countdown_problem(text: str) -> tuple[list[str], str]:
    given, target = text.rstrip("=").split(">")
    return sorted(given.split(" ")), target


def test_held_out_problems_never_occur_in_training_even_reordered() -> None:
    """A space small enough that an unchecked training split would hit held-out problems all the time."""
    options = {"min_value": 1, "max_value": 4, "max_target": 16, "train_size": 120, "eval_size": 40}
    task = make("countdown", **options)
    held_out = [countdown_problem(text) for text in texts(task, "eval")]
    trained = [countdown_problem(text) for text in texts(task, "train")]
    assert len({json.dumps(problem) for problem in held_out}) == 40
    assert not [problem for problem in trained if problem in held_out]
    unchecked = make("countdown", **{**options, "eval_size": 1})
    assert [problem for problem in map(countdown_problem, texts(unchecked, "train")) if problem in held_out]


def test_the_order_of_terms_makes_no_new_sum() -> None:
    task = make("chain_sum", min_digits=1, max_digits=1, max_terms=2, train_size=300, eval_size=60)

    def terms(text: str) -> tuple[str, ...]:
        return tuple(sorted(("+" + text.rstrip("=")).replace("+", " +").replace("-", " -").split()))

    held_out = {terms(text) for text in texts(task, "eval")}
    assert len(held_out) == 60
    assert not held_out & {terms(text) for text in texts(task, "train")}


def test_too_few_problems_is_an_error_with_a_fix() -> None:
    task = make("chain_sum", min_digits=1, max_digits=1, max_terms=2, eval_size=10_000)
    with pytest.raises(DareError, match="too few chain_sum problems") as error:
        task.prompt("train", 0)
    assert "eval_size" in str(error.value)


@pytest.mark.parametrize(("split", "index", "message"), [("test", 0, "unknown split"), ("eval", 20, "no problem")])
def test_wrong_split_or_index(split: str, index: int, message: str, tasks: dict[str, Task[Any]]) -> None:
    with pytest.raises(DareError, match=message):
        tasks["chain_sum"].prompt(split, index)
    with pytest.raises(DareError, match="no problem"):
        tasks["chain_sum"].prompt("train", -1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdown", {"min_numbers": 5, "max_numbers": 3}, "min_numbers 5 is above"),
        ("countdown", {"max_valu": 3}, "did you mean 'max_value'"),
        ("chain_sum", {"min_terms": 9}, "min_terms 9 is above"),
        ("mini_sudoku", {"min_empty": 12, "max_empty": 9}, "min_empty 12 is above"),
        ("mini_sudoku", {"max_empty": 13}, "max_empty"),
        ("reasoning_gym", {"answer_tag": "<a>"}, "answer_tag"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DareError, match=message):
        make(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "spell_backwards"}, "did you mean 'spell_backward'"),
        ({"parameters": {"max_word_length": 4}}, "refuses its parameters"),
        ({"parameters": {"min_word_len": -1}}, "refuses its parameters"),
    ],
)
def test_wrong_dataset_or_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DareError, match=message):
        make("reasoning_gym", **options).prompt("train", 0)


@pytest.mark.parametrize("name", COMPACT)
def test_hostile_text_earns_nothing_in_bounded_time(name: str, tasks: dict[str, Task[Any]]) -> None:
    prompt = tasks[name].prompt("train", 0)
    start = time.process_time()
    for text in [*HOSTILE, prompt.text or "", f"{prompt.text}{prompt.answer}", f"{prompt.answer} {prompt.answer}"]:
        reward = tasks[name].reward(prompt, text)
        assert not reward.is_solved
        assert 0.0 <= reward.value < 1.0
    assert time.process_time() - start < 0.5


@settings(max_examples=50)
@given(text=st.text(alphabet="0123456789+-*/() >=.,abc\n\u0663", max_size=30))
def test_rewards_are_in_range_and_solved_means_one(text: str, tasks: dict[str, Task[Any]]) -> None:
    for task in tasks.values():
        reward = task.reward(task.prompt("eval", 3), text)
        assert 0.0 <= reward.value <= 1.0
        assert reward.is_solved == (reward.value == 1.0)


# Countdown


def countdown_prompt(numbers: list[int], target: int) -> tuple[Countdown, Prompt]:
    """A problem of our own choice, with a real prompt's provenance."""
    task = make("countdown")
    assert isinstance(task, Countdown)
    meta = dict(task.prompt("train", 0).meta)
    meta["entry"] = {"answer": "", "metadata": {"numbers": numbers, "target": target}}
    return task, Prompt(uid="countdown/own", text="own", meta=meta)


@pytest.mark.parametrize(
    ("text", "value", "is_solved"),
    [
        ("(3+7)*2", 1.0, True),
        ("2*7+2*3", 0.0, False),  # a number used twice
        ("2*(3+7)", 1.0, True),
        ("2*3+7", 0.1, False),  # right numbers, wrong value: format reward
        ("20", 0.0, False),  # the target itself
        ("2*7+6", 0.0, False),
        ("27-7", 0.0, False),  # digits glued together
        ("(3+7)*2=20", 0.0, False),
        ("(3+7)*2 or so", 0.0, False),
        ("answer: (3+7)*2", 0.0, False),
        ("(3+7)*2\n(3+7)*2", 0.0, False),
        ("7-(-3)*2", 0.0, False),  # a sign is no operator
        ("(3+7)*2+0", 0.0, False),
        ("3**2+7", 0.0, False),
        ("2*(3+07)", 0.0, False),
        ("2*(3+7.0)", 0.0, False),
    ],
)
def test_countdown_rewards(text: str, value: float, is_solved: bool) -> None:
    task, prompt = countdown_prompt([7, 2, 3], 20)
    reward = task.reward(prompt, text)
    assert (reward.value, reward.is_solved) == (value, is_solved)


def test_countdown_is_exact_where_floats_are_close() -> None:
    """reasoning-gym accepts a relative error of 1e-5; an expression that is nearly right is wrong."""
    task, prompt = countdown_prompt([999_999, 1, 1_000_000], 1)
    assert not task.reward(prompt, "1*999999/1000000").is_solved
    assert task.reward(prompt, "1000000/(999999+1)").is_solved


def test_countdown_counts_repeated_numbers() -> None:
    task, prompt = countdown_prompt([4, 4, 1], 7)
    assert task.reward(prompt, "4+4-1").is_solved
    assert task.reward(prompt, "4*1+3").parts["numbers"] == 0.0
    assert task.reward(prompt, "4-1").parts == {"format": 1.0, "numbers": 0.0}


# Chain sum


def test_chain_sum_wants_the_plain_number(tasks: dict[str, Task[Any]]) -> None:
    task = make("chain_sum", format_reward=0.25)
    prompt = task.prompt("train", 0)
    answer = prompt.answer or ""
    for text in (f"+{answer}", f"0{answer}", f"{answer}.0", f"{answer},000", f"={answer}", "-0", "1 4"):
        assert task.reward(prompt, text).value == 0.0
    wrong = str(int(answer) + 1)
    assert task.reward(prompt, wrong).value == 0.25
    assert not task.reward(prompt, wrong).is_solved


# Mini sudoku


def test_mini_sudoku_partial_credit_never_counts_as_solved(tasks: dict[str, Task[Any]]) -> None:
    task = tasks["mini_sudoku"]
    assert isinstance(task, MiniSudoku)
    prompt = task.prompt("train", 0)
    puzzle, answer = (prompt.text or "")[:16], prompt.answer or ""
    blank = puzzle.index(".")
    wrong = answer[:blank] + ("1" if answer[blank] != "1" else "2") + answer[blank + 1 :]
    reward = task.reward(prompt, wrong)
    num_empty = puzzle.count(".")
    assert not reward.is_solved
    assert reward.parts == {"format": 1.0, "clues": 1.0, "cells": (num_empty - 1) / num_empty}
    assert reward.value == pytest.approx(0.5 * (num_empty - 1) / num_empty)


def test_mini_sudoku_changed_clues_earn_nothing(tasks: dict[str, Task[Any]]) -> None:
    """A valid grid that is not an answer to this puzzle: the digits renamed, so that every clue changes."""
    task = tasks["mini_sudoku"]
    prompt = task.prompt("train", 1)
    renamed = (prompt.answer or "").translate(str.maketrans("1234", "2341"))
    reward = task.reward(prompt, renamed)
    assert (reward.value, reward.is_solved, reward.parts["clues"]) == (0.0, False, 0.0)


def test_mini_sudoku_does_not_cut_or_pad(tasks: dict[str, Task[Any]]) -> None:
    task = tasks["mini_sudoku"]
    prompt = task.prompt("train", 2)
    answer = prompt.answer or ""
    for text in (answer[:-1], answer + "1", answer + answer, answer[:8] + " " + answer[8:], "x" + answer):
        assert task.reward(prompt, text).value == 0.0


# Any reasoning-gym dataset, scored in another process


@pytest.fixture(scope="module")
def sympy_task() -> Iterator[Any]:
    task: Any = make("reasoning_gym", dataset="countdown", parameters={"min_numbers": 3, "max_numbers": 3})
    yield task
    task.close()


@pytest.mark.slow
def test_isolated_scorer_survives_code_and_bombs(sympy_task: Any, tmp_path: Any) -> None:
    """This dataset's scorer evaluates the text."""
    prompt = sympy_task.prompt("train", 3)
    assert sympy_task.reward(prompt, prompt.answer).is_solved
    target = tmp_path / "written"
    for text in (
        "",
        "9**9**9**9**9",
        f"open({str(target)!r}, 'w')",
        f"__import__('os').mkdir({str(target)!r})",
        f"__import__('os').system('touch {target}')",
        "__import__('os')._exit(0)",
        "'x'*10**11",
        "print('1.0')",
        "x" * 10**6,
        *HOSTILE[4:],
    ):
        assert sympy_task.reward(prompt, text).value <= 0.05, text
    assert not target.exists()
    assert sympy_task.reward(prompt, prompt.answer).value == 1.0


@pytest.mark.slow
def test_answer_tags_and_chat() -> None:
    task: Any = make("reasoning_gym", answer_tag="answer", is_chat=True)
    prompt = task.prompt("train", 0)
    assert prompt.messages is not None
    assert "<answer></answer>" in prompt.messages[0]["content"]
    assert task.reward(prompt, f"so <answer>no</answer> then {prompt.answer} done").is_solved
    assert not task.reward(prompt, f"{prompt.answer} then <answer>no</answer>").is_solved
    assert not task.reward(prompt, (prompt.answer or "").removesuffix("</answer>")).is_solved
    task.close()


@pytest.mark.slow
def test_a_dataset_that_is_not_reproducible_is_an_error() -> None:
    """isomorphic_strings depends on Python's hash seed, so the child (almost surely) finds other problems."""
    task: Any = make("reasoning_gym", dataset="isomorphic_strings")
    with pytest.raises(DareError, match="does not reproduce"):
        for index in range(8):
            task.reward(task.prompt("train", index), "True")
    task.close()


def test_reasoning_gym_alphabet_covers_ascii_and_extras() -> None:
    assert set(make("reasoning_gym", extra_characters="€").alphabet) >= set("aZ09 \n~€")
