"""A benchmark run is the same however it is cut up, and half a run is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dare
from dare.api import evaluate_benchmarks
from dare.core.errors import DareError
from dare.core.files import read_lines
from dare.evals import suite
from dare.evals.backend import NativeBackend
from dare.evals.benchmarks.table import BENCHMARKS
from dare.evals.compare import compare_text, load_runs, table_text
from dare.evals.suite import Shard
from dare.sandbox.run import strongest_level
from tests.evals.conftest import ASCII

FAST = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "task.num_samples": 2}


@pytest.fixture(params=["llada", "sdar"])
def checkpoint(request: pytest.FixtureRequest, ascii_checkpoints: dict[str, Path]) -> Path:
    return ascii_checkpoints[request.param]


def _run(checkpoint: Path, out: Path, tasks: list[str] | None = None, **options: Any) -> dict[str, Any]:
    overrides = {**FAST, **options.pop("overrides", {})}
    return evaluate_benchmarks(checkpoint, tasks or ["gsm8k"], out=out, overrides=overrides, **options)


def _records(out: Path, task: str = "gsm8k") -> str:
    return (out / task / "records.jsonl").read_text()


def test_records_do_not_depend_on_how_the_run_is_cut_up(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(checkpoint, tmp_path / "whole")["gsm8k"]
    expected = _records(tmp_path / "whole")
    assert len(expected.splitlines()) == 18
    _run(checkpoint, tmp_path / "batch", overrides={"batch_size": 3})
    assert _records(tmp_path / "batch") == expected
    monkeypatch.setattr(suite, "_CHUNK", 5)
    _run(checkpoint, tmp_path / "chunk")
    assert _records(tmp_path / "chunk") == expected
    for number in (2, 0, 1):
        result = _run(checkpoint, tmp_path / "shards", shard=Shard(number, 3))["gsm8k"]
        assert (result is None) == (number != 1)
    assert _records(tmp_path / "shards") == expected
    for name in ("identity", "scores", "counts", "cost"):
        assert result[name] == whole[name]
    _run(checkpoint, tmp_path / "seed", overrides={"task.seed": 1})
    assert _records(tmp_path / "seed") != expected


def test_a_killed_run_goes_on_and_never_looks_complete(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(suite, "_CHUNK", 4)
    calls = 0

    def stop(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        _run(checkpoint, out, on_progress=stop)
    part = out / "gsm8k" / "records-0of1.jsonl"
    assert len(read_lines(part)) == 8
    assert not (out / "gsm8k" / "manifest.json").exists()
    assert not (out / "gsm8k" / "records.jsonl").exists()
    with pytest.raises(DareError, match="unfinished"):
        load_runs(out)
    with part.open("a") as file:
        file.write('{"index": 4, "sam')  # killed while writing a line
    _run(checkpoint, out)
    assert _records(out) == _records(tmp_path / "whole")
    assert {path.name for path in (out / "gsm8k").iterdir()} == {
        "settings.json", "records.jsonl", "manifest.json", "card.md"
    }  # fmt: skip


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    first = _run(checkpoint, tmp_path)
    assert _run(checkpoint, tmp_path, overrides={"batch_size": 1}) == first
    with pytest.raises(DareError, match="other settings") as caught:
        _run(checkpoint, tmp_path, overrides={"temperature": 0.5})
    assert "settings" in str(caught.value)
    with (data / "gsm8k" / "test.jsonl").open("a") as file:
        file.write('{"question": "1?", "answer": "#### 1"}\n')
    with pytest.raises(DareError, match="other settings"):
        _run(checkpoint, tmp_path)


def test_the_card_says_what_was_run(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    manifest = _run(checkpoint, tmp_path, overrides={"task.num_shots": 2})["gsm8k"]
    assert manifest == json.loads((tmp_path / "gsm8k" / "manifest.json").read_text())
    assert manifest["identity"]["num_documents"] == 9
    assert manifest["settings"]["decode"]["gen_length"] == 8
    for name in ("checkpoint_sha256", "tokenizer_sha256"):
        assert len(manifest["model"][name]) == 64
    assert (manifest["model"]["chat_template_sha256"] is None) == (manifest["identity"]["style"] == "text")
    assert set(manifest["scores"]) == {"flexible", "strict"}
    assert "pass@2" in manifest["scores"]["flexible"]
    assert manifest["counts"]["completions"] == 18
    assert set(manifest["counts"]["not_extracted"]) == {"flexible", "strict"}
    assert manifest["versions"]["torch"]
    card = (tmp_path / "gsm8k" / "card.md").read_text()
    for word in (manifest["identity"]["task_hash"], "tokens per forward", "truncated", "checkpoint_sha256", "seed"):
        assert word in card


needs_jail = pytest.mark.skipif(strongest_level() != "namespaces", reason="this kernel refuses namespaces")
PROGRAMS = ("humaneval", "mbpp", "mbpp_sanitized")


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=needs_jail) if name in PROGRAMS else name for name in BENCHMARKS]
)
def test_every_benchmark_runs(task: str, ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    manifest = _run(ascii_checkpoints["llada"], tmp_path, [task], overrides={"task.limit": 1})[task]
    assert manifest["identity"]["num_documents"] == 1
    assert (tmp_path / task / "card.md").is_file()


@pytest.mark.parametrize("task", ["mmlu", "hellaswag", "arc_c", "piqa", "winogrande", "gpqa", "mmlu_pro"])
def test_choices_by_likelihood(task: str, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    overrides = {"task.method": "likelihood", "likelihood.num_samples": 3}
    first = _run(checkpoint, tmp_path / "a", [task], overrides=overrides)[task]
    _run(checkpoint, tmp_path / "b", [task], overrides={**overrides, "likelihood.batch_size": 2})
    one, two = (json.loads(_records(tmp_path / out, task)) for out in ("a", "b"))
    assert one["logps"] == pytest.approx(two["logps"], abs=2e-4)
    assert one["picks"] == two["picks"]
    assert set(first["scores"]) == {"acc", "acc_norm"}
    assert first["headline"] == "acc"


def test_examples_come_before_a_likelihood_s_context(
    ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(data / "arc_c" / "test.jsonl", data / "arc_c" / "train.jsonl")
    seen: list[str] = []
    original = NativeBackend.log_likelihoods

    def watch(self: NativeBackend, items: list[Any], *rest: Any) -> list[float]:
        seen.extend(f"{item.prompt.text}|{item.text}" for item in items)
        return original(self, items, *rest)

    monkeypatch.setattr(NativeBackend, "log_likelihoods", watch)
    overrides = {"task.method": "likelihood", "likelihood.num_samples": 1, "task.num_shots": 1}
    _run(ascii_checkpoints["llada"], tmp_path, ["arc_c"], overrides=overrides)
    solved = "Question: Hot?\nAnswer: fire\n\n"
    assert seen == [f"{solved}Question: Hot?\nAnswer:| {choice}" for choice in ("ice", "fire")]


def test_procedural_tasks_are_benchmarks_too(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    name = "reasoning_gym:spell_backward"
    manifest = _run(ascii_checkpoints["llada"], tmp_path, [name], overrides={"task.limit": 2})[name]
    assert set(manifest["scores"]) == {"solved", "score"}
    assert (tmp_path / "reasoning_gym_spell_backward" / "manifest.json").is_file()


def test_mistakes_are_named_before_anything_runs(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DareError, match="unknown benchmark 'gsm8'") as caught:
        _run(checkpoint, tmp_path, ["gsm8"])
    assert "did you mean 'gsm8k'" in str(caught.value)
    with pytest.raises(DareError, match="method"):
        _run(checkpoint, tmp_path, ["gsm8k"], overrides={"task.method": "likelihoods"})
    with pytest.raises(DareError, match="cannot be judged by likelihood"):
        _run(checkpoint, tmp_path, ["gsm8k"], overrides={"task.method": "likelihood"})
    with pytest.raises(DareError, match="plain text"):
        _run(checkpoint, tmp_path, ["mmlu"], overrides={"task.method": "likelihood", "task.style": "chat"})
    with pytest.raises(DareError, match="too few examples"):
        _run(checkpoint, tmp_path, ["gsm8k"], overrides={"task.num_shots": 4})
    with pytest.raises(DareError, match="has no examples"):
        _run(checkpoint, tmp_path, ["sudoku"], overrides={"task.num_shots": 1})
    with pytest.raises(DareError, match="greedy"):
        _run(checkpoint, tmp_path, overrides={"temperature": 0.0})
    with pytest.raises(DareError, match="nothing to evaluate"):
        evaluate_benchmarks(checkpoint, out=tmp_path)
    shutil.rmtree(data / "mmlu")
    with pytest.raises(DareError, match="the data of mmlu is not here") as caught:
        _run(checkpoint, tmp_path, ["gsm8k", "mmlu"])
    assert "test.jsonl" in str(caught.value)
    assert "cais/mmlu" in str(caught.value)
    assert list(tmp_path.iterdir()) == [data]


def test_compare_lists_what_differs_first(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    checkpoint = ascii_checkpoints["llada"]
    _run(checkpoint, tmp_path / "a")
    _run(checkpoint, tmp_path / "b", overrides={"temperature": 0.5})
    text = compare_text(tmp_path / "a", tmp_path / "b")
    assert text.index("settings.decode.temperature | 1.0 | 0.5") < text.index("95 % interval")
    _run(checkpoint, tmp_path / "c", overrides={"task.limit": 5})
    refused = compare_text(tmp_path / "a", tmp_path / "c")
    assert "identity.num_documents | 9 | 5" in refused
    assert "not comparable" in refused
    assert "95 % interval" not in refused
    table = table_text([tmp_path / "a", tmp_path / "b"])
    assert table.count("TPF") == 2
    with pytest.raises(DareError, match="not the same task"):
        table_text([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(DareError, match="no task in common"):
        _run(checkpoint, tmp_path / "d", ["sudoku"])
        compare_text(tmp_path / "a", tmp_path / "d")
    with pytest.raises(DareError, match="no evaluation here"):
        compare_text(tmp_path / "a", tmp_path / "nowhere")


def test_greedy_completions_do_not_depend_on_the_batch(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    greedy = {"temperature": 0.0, "task.num_samples": 1}
    for size in (1, 4, 256):
        _run(checkpoint, tmp_path / str(size), overrides={**greedy, "batch_size": size})
    assert _records(tmp_path / "1") == _records(tmp_path / "4") == _records(tmp_path / "256")


def test_the_engine_is_that_of_generate(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    checkpoint = ascii_checkpoints["llada"]
    _run(checkpoint, tmp_path, overrides={"temperature": 0.0, "task.num_samples": 1})
    texts = [json.loads(line)["text"] for line in _records(tmp_path).splitlines()]
    prompts = [f"Question: What is {n} plus 2?\nAnswer:" for n in range(9)]
    completions = dare.load(checkpoint).generate(prompts, gen_length=8, block_length=4)
    assert texts == [completion.text for completion in completions]
    assert all(set(text) <= set(ASCII) for text in texts)
