"""Tiny checkpoints and a few rows that they answer partly right, with the native evaluation of both.

The folder runs in an environment of its own (`make test-backends`); elsewhere its tests are skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dare
from dare import api
from dare.core.rng import Key
from dare.evals.benchmarks.table import find_benchmark
from dare.evals.presets import plan
from dare.evals.suite import run_benchmark
from dare.families.tokenizer import char_tokenizer
from dare.rewards.mathematics import flexible_answer
from tests.conftest import save_checkpoint
from tests.evals.conftest import ASCII, TEMPLATE

FAMILIES = ("llada", "sdar")  # masked, and a block model with a chat template
OPTIONS = {"gen_length": 16, "block_length": 4, "likelihood.num_samples": 5, "task.num_shots": 2}
TASKS = {"gsm8k": "generate", "arc_c": "likelihood", "winogrande": "likelihood"}
NUM_ROWS = 6


@dataclass(frozen=True)
class Case:
    """A checkpoint, its data folder, and what the native evaluation says: records by task."""

    family: str
    checkpoint: Path
    data: Path
    native: dict[str, list[dict[str, Any]]]

    def mean(self, task: str, metric: str) -> float:
        scores = [record["scores"][metric] for record in self.native[task]]
        return sum(scores) / len(scores)

    def options(self, task: str) -> dict[str, Any]:
        return {**OPTIONS, "task.method": TASKS[task]}


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


def make_case(root: Path, family: str) -> Case:
    """A checkpoint, rows and their native evaluation in a new folder."""
    checkpoint = _varied_checkpoint(root / "checkpoint", family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARE_DATA", str(root / "data"))
        _write_rows(root / "data", checkpoint)
        native = {task: _run_native(checkpoint, task, root / "native") for task in TASKS}
    return Case(family, checkpoint, root / "data", native)


@pytest.fixture
def data(case: Case, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The case's data folder, found by DARE_DATA; nothing is downloaded."""
    monkeypatch.setenv("DARE_DATA", str(case.data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return case.data


def _varied_checkpoint(path: Path, family: str) -> Path:
    """Random weights, large enough that different prompts get different answers, with digits in most of them."""
    tokenizer = char_tokenizer(ASCII)
    if family == "sdar":
        tokenizer.chat_template = TEMPLATE
    save_checkpoint(path, family, tokenizer, seed=2, hidden_size=16, num_heads=2, mlp_size=24, max_length=1024)
    model = dare.load(path)
    matrices = [parameter for parameter in model.family.network.parameters() if parameter.ndim > 1]
    with torch.no_grad():
        for matrix in matrices:
            matrix.mul_(6.0)
        matrices[-1][tokenizer.convert_tokens_to_ids(list("0123456789"))] *= 2.5  # rows of the output head
    model.save(path)
    return path


def _write_rows(data: Path, checkpoint: Path) -> None:
    draw = Key(5)
    problems = [
        {"question": f"What is {n * 7} plus {n}?", "answer": f"It is {n * 8}.\n#### {n * 8}"} for n in range(NUM_ROWS)
    ]
    _write(data / "gsm8k" / "train.jsonl", problems[:2])
    _write(data / "gsm8k" / "test.jsonl", problems)
    words = ["red", "green", "a cold stone", "the sea", "seven", "iron"]
    choices = [[words[i] for i in draw.fold(n).permutation(len(words))[:3]] for n in range(NUM_ROWS)]
    science = [
        {"question": f"Which is number {n}?", "choices": {"text": choices[n], "label": ["A", "B", "C"]},
         "answerKey": "ABC"[n % 3]} for n in range(NUM_ROWS)
    ]  # fmt: skip
    blanks = [
        {"sentence": f"Box {n} holds the cup as _ is {words[n]}.", "option1": "box", "option2": "cup",
         "answer": str(1 + n % 2)} for n in range(NUM_ROWS)
    ]  # fmt: skip
    for name, split, rows in (("arc_c", "test", science), ("winogrande", "validation", blanks)):
        _write(data / name / f"{split}.jsonl", rows)
        _write(data / name / "train.jsonl", rows[:2])
    # Every second problem gets the number that the model answers as its gold answer, so that scores are not all 0.
    for row, record in list(zip(problems, _run_native(checkpoint, "gsm8k", data.parent / "first"), strict=True))[::2]:
        answer = flexible_answer(record["text"])
        if answer is not None:
            row["answer"] = f"#### {answer}"
    _write(data / "gsm8k" / "test.jsonl", problems)


def _run_native(checkpoint: Path, task: str, out: Path) -> list[dict[str, Any]]:
    model = dare.load(checkpoint)
    options = {**OPTIONS, "task.method": TASKS[task]}
    [planned] = plan(None, [task], family=model.family.spec.name, checkpoint="", overrides=options)
    backend = api.evaluation_backend(model, str(checkpoint))
    run_benchmark(backend, find_benchmark(task), planned.settings, out)
    return [json.loads(line) for line in (out / task / "records.jsonl").read_text().splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
