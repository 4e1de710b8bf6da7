"""A DARE model in OpenCompass: equal answers and scores, its configurations, failures that show, its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dare
from dare import api
from dare.core.errors import DareError
from dare.evals.backend import NativeBackend
from dare.harness.planning import plan_tasks
from tests.backends.conftest import TASKS, Case

pytest.importorskip("opencompass", reason="needs the extra dare-dllm[opencompass]")
from mmengine.config import ConfigDict

from dare.harness.compass.benchmarks import SandboxedHumanEval, SandboxedMBPP
from dare.harness.compass.configuration import find_datasets, sandboxed
from dare.harness.compass.inferencers import split_texts
from dare.harness.compass.model import DareModel
from dare.harness.compass.run import run_opencompass

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backend(case: Case) -> NativeBackend:
    return api.evaluation_backend(dare.load(case.checkpoint), str(case.checkpoint))


def plans(case: Case, tasks: list[str], **overrides: Any) -> Any:
    return plan_tasks(None, tasks, family=case.family, checkpoint="", overrides=overrides)


def test_answers_and_scores_are_those_of_the_native_evaluation(
    case: Case, backend: NativeBackend, data: Path, tmp_path: Path
) -> None:
    for task in TASKS:
        name = f"dare_{task}"
        planned = plan_tasks(None, [name], family=case.family, checkpoint="", overrides=case.options(task))
        result = run_opencompass(backend, planned, tmp_path)[name]
        lines = (tmp_path / name / "records.jsonl").read_text().splitlines()
        for record, found in zip(case.native[task], map(json.loads, lines), strict=True):
            if TASKS[task] == "generate":
                assert found["prediction"] == record["text"]
            else:
                assert found["logps"] == pytest.approx(record["logps"], abs=1e-4)
                assert found["prediction"] == record["picks"]["acc"]
            assert {metric: found["judged"][metric] for metric in record["scores"]} == {
                metric: [score] for metric, score in record["scores"].items()
            }
        for metric in case.native[task][0]["scores"]:
            assert result["scores"][metric] == pytest.approx(100 * case.mean(task, metric))


def test_the_batch_is_no_part_of_an_answer(case: Case, backend: NativeBackend, data: Path) -> None:
    model = DareModel("", decode={"block_length": 4}, backend=backend)
    prompts = ["What is 2?", "What is 12 plus 4?", "So"]
    whole = model.generate(prompts, 8)
    assert [model.generate([prompt], 8)[0] for prompt in prompts] == whole
    assert model.generate(prompts[:1], 8, stopping_criteria=[whole[0][2]]) == [whole[0][: whole[0].index(whole[0][2])]]
    assert len(model.generate(prompts[:1], 4)[0]) == len(whole[0]) - 4
    assert DareModel("", decode={"block_length": 4, "gen_length": 8}, backend=backend).generate(prompts, 4) == whole


def test_a_configuration_of_opencompass_is_scored_given_the_question(
    case: Case, backend: NativeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARC's and GSM8K's own files, prompts and evaluators; the likelihood is that of the choice, not of the text."""
    monkeypatch.setenv("COMPASS_DATA_CACHE", str(tmp_path))
    arc = tmp_path / "data" / "ARC" / "ARC-c" / "ARC-Challenge-Dev.jsonl"
    words = ["red", "green", "a stone", "the sea"]
    choices = [{"text": word, "label": label} for word, label in zip(words, "ABCD", strict=True)]
    _write(arc, [{"question": {"stem": f"Which, {n}?", "choices": choices}, "answerKey": "C"} for n in range(3)])
    for split in ("train", "test"):
        rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
        _write(tmp_path / "data" / "gsm8k" / f"{split}.jsonl", rows)
    names = ["ARC_c_ppl_a450bd", "gsm8k_0shot_v2_gen_17d799"]
    planned = plans(case, names, **{"gen_length": 8, "block_length": 4, "likelihood.num_samples": 3, "task.limit": 2})
    results = run_opencompass(backend, planned, tmp_path / "out")
    assert [result["num_documents"] for result in results.values()] == [2, 2]
    assert {"accuracy"} == set(results[names[0]]["scores"]) == set(results[names[1]]["scores"])
    [first, _] = map(json.loads, (tmp_path / "out" / names[0] / "records.jsonl").read_text().splitlines())
    context = "Question: Which, 0?\nAnswer:"
    model = DareModel("", likelihood={"num_samples": 3}, backend=backend)
    [expected] = model.score_choices([[(context, f" \n{word}") for word in words]])
    assert first["logps"] == pytest.approx(expected, abs=1e-4)


def test_missing_data_is_named_before_the_first_forward(
    case: Case, backend: NativeBackend, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPASS_DATA_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for task, message in (
        ("gsm8k_gen_1d7fe4", "gsm8k"),
        ("gsm8k_gen_1d7fe5", "did you mean"),
        ("none.py", "not there"),
        ("dare_sudoku", "sudoku"),
    ):
        with pytest.raises(DareError) as caught:
            run_opencompass(backend, plans(case, ["dare_gsm8k", task]), tmp_path / "out")
        assert message in str(caught.value)
    with pytest.raises(DareError, match="its own examples"):
        run_opencompass(backend, plans(case, ["gsm8k_gen_1d7fe4"], **{"task.num_shots": 1}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_that_fails_has_no_result(
    case: Case, backend: NativeBackend, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise DareError("the model is gone")

    planned = plans(case, ["dare_gsm8k"], gen_length=8, block_length=4)
    with monkeypatch.context() as patch:
        patch.setattr(NativeBackend, "generate", fails)
        with pytest.raises(DareError, match="gone"):
            run_opencompass(backend, planned, tmp_path)
    assert not (tmp_path / "dare_gsm8k" / "result.json").exists()
    assert run_opencompass(backend, planned, tmp_path)["dare_gsm8k"]["num_documents"] == 6


def test_perplexity_of_a_whole_text_is_refused(case: Case, backend: NativeBackend) -> None:
    model = DareModel("", backend=backend)
    with pytest.raises(DareError, match="which part of the text"):
        model.get_ppl(["a b"])
    [alone] = model.get_loglikelihood(["a b"], [" b"])
    assert alone == pytest.approx(model.score_choices([[("a", " b")]])[0][0], abs=1e-4)
    for wrong in ({"decode": {"steps": 2}}, {"likelihood": {"draws": 2}}, {"generation_kwargs": {"top_k": 1}}):
        with pytest.raises(DareError):
            DareModel("", backend=backend, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Q\nAnswer: red", "Q\nAnswer: blue"], [("Q\nAnswer:", " red"), ("Q\nAnswer:", " blue")]),
        (["a boat", "a boot"], [("a", " boat"), ("a", " boot")]),
        (["the cat", "the cat sat"], [("the", " cat"), ("the", " cat sat")]),
        (["x", "y"], [("", "x"), ("", "y")]),
    ],
)
def test_labels_prompts_are_split_at_a_word(texts: list[str], expected: list[tuple[str, str]]) -> None:
    assert split_texts(texts) == expected


def test_programs_run_in_the_sandbox() -> None:
    """Drop-ins for the two evaluators of programs; others are refused."""
    row = {
        "task_id": "X/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
        "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }  # fmt: skip
    found = SandboxedHumanEval().score(["    return 2 * x\n", "    return x\n"], ["double"] * 2, [row, row])
    assert found["humaneval_pass@1"] == 50.0
    assert [detail["is_correct"] for detail in found["details"]] == [True, False]
    answers = ["[BEGIN]\n'def add(a, b):\n    return a + b'\n[DONE]", "[BEGIN]\n'def add(a, b):\n    return a'\n[DONE]"]
    assert SandboxedMBPP().score(answers, ["assert add(1, 2) == 3"] * 2)["score"] == 50.0
    for name, replaced in (("humaneval_gen_8e312c", "SandboxedHumanEval"), ("mbpp_gen_830460", "SandboxedMBPP")):
        [dataset] = sandboxed(find_datasets(name))
        assert dataset["eval_cfg"]["evaluator"]["type"].__name__ == replaced
    other = ConfigDict(abbr="x", eval_cfg={"evaluator": {"type": "opencompass.datasets.LCBCodeGenerationEvaluator"}})
    with pytest.raises(DareError, match="without isolation"):
        sandboxed([other])


def test_the_command_line_of_opencompass_finds_our_configurations(case: Case, data: Path, tmp_path: Path) -> None:
    if case.family != "sdar":
        pytest.skip("once is enough: the command takes long to start")
    configs = subprocess.run(
        [sys.executable, "-m", "dare.cli", "eval", "configs"], capture_output=True, text=True, check=True
    ).stdout.strip()
    words = ["--config-dir", configs, "--models", "dare_model", "--datasets", "gsm8k_dare", "-w", str(tmp_path / "out")]
    environment = {**os.environ, "DARE_CHECKPOINT": str(case.checkpoint), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "opencompass.cli.main", *words, "--debug"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    [path] = (tmp_path / "out").rglob("results/dare/dare_gsm8k.json")
    assert "flexible" in json.loads(path.read_text()), done.stderr[-2000:]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
