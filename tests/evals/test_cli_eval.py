"""`dare eval` on benchmarks, `dare eval compare | table` and `dare data path | fetch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dare.cli import app

SMALL = ["gen_length=8", "block_length=4"]


def dare(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_benchmarks_run_compare_and_tabulate(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    checkpoint = ascii_checkpoints["llada"]
    words = ["--preset", "table", "--tasks", "gsm8k,sudoku", "--num", 3, *SMALL]
    first = dare("eval", checkpoint, *words, "--out", tmp_path / "a")
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["gsm8k", "sudoku"]
    assert all(word in lines[0] for word in ("flexible", "strict", "tokens/forward", "NFE", "["))
    printed = dare("eval", "run", checkpoint, *words, "--json", "--out", tmp_path / "b", "--seed", 1)
    manifest = json.loads(printed.stdout)["gsm8k"]
    assert manifest["identity"]["num_documents"] == 3
    assert manifest["facts"]["preset"] == "table"
    assert "gen_length" in manifest["facts"]["overridden"]
    compared = dare("eval", "compare", tmp_path / "a", tmp_path / "b")
    assert "settings.seed | 0 | 1" in compared.stdout
    table = dare("eval", "table", tmp_path / "a", tmp_path / "b")
    assert table.stdout.startswith("| model | gsm8k | sudoku |")


def test_shards_of_the_command_line(ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    words = ["eval", ascii_checkpoints["llada"], "--tasks", "gsm8k", *SMALL, "--out", tmp_path / "a"]
    assert "this shard is done" in dare(*words, "--shard", "1/2").stdout
    unfinished = dare("eval", "compare", tmp_path / "a", tmp_path / "a")
    assert unfinished.exit_code == 2
    assert "unfinished" in unfinished.stderr
    assert "flexible" in dare(*words, "--shard", "0/2").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "gsm8"], "did you mean 'gsm8k'?"),
        (["--preset", "tabl"], "unknown preset 'tabl'"),
        (["--preset", "paper"], "unknown published model"),
        (["--preset", "paper", "--model", "SDAR-8B-Chat"], "another family"),
        (["--tasks", "gsm8k", "--shard", "2/2"], "a shard is NUMBER/COUNT"),
        (["--tasks", "gsm8k", "--task", "countdown"], "--task is for a task"),
        (["--task", "countdown", "--shard", "0/2"], "--shard is for benchmarks"),
        (["--tasks", "gsm8k", "steps=3"], "unknown key"),
        (["--tasks", "gsm8k", "task.shots=3"], "unknown key"),
        (["--tasks", "gsm8k", "gen_length=9000"], "longer than the model"),
    ],
)
def test_mistakes_are_messages(
    words: list[str], message: str, ascii_checkpoints: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    result = dare("eval", ascii_checkpoints["llada"], *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out" / "gsm8k" / "manifest.json").exists()


def test_data_path_says_what_is_missing(data: Path) -> None:
    (data / "gsm8k" / "test.jsonl").unlink()
    result = dare("data", "path")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert str(data) in lines["data"]
    assert "missing: gsm8k/test.jsonl of openai/gsm8k, configuration main, split test" in lines["gsm8k"]
    assert str(data / "sudoku" / "test.jsonl") in lines["sudoku"]


def test_fetching_without_a_network_says_what_to_do(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    result = dare("data", "fetch", "arc_c")
    assert result.exit_code == 2
    assert str(data / "arc_c" / "test") in result.stderr
    assert dare("data", "fetch", "arc").exit_code == 2


def test_fetched_rows_are_read_back(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"question": "1?", "answer": "#### 1"}, {"question": "\u2028?", "answer": "#### 2"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert dare("data", "fetch", "gsm8k").exit_code == 0
    from dare.evals.benchmarks.table import find_benchmark

    assert [document.gold for document in find_benchmark("gsm8k").documents()] == ["1", "2"]
