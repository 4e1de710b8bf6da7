"""`dare generate --file --out`: every row once, whatever kills it, and clear words about bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dare.cli import app
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.model import Model, load
from dare.terminal.bulk import BulkResult, generate_file
from dare.terminal.settings import read_prompt_file

TEXTS = ["1+1=", "12+7=", "(3)", "9-9=", "ABC", "12+7=", "7*7=", ">", "5", "12+7="]
OPTIONS: dict[str, Any] = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "batch_size": 3}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def model(tiny_checkpoints: dict[str, Path]) -> Model:
    return load(tiny_checkpoints["sdar"])


def complete(model: Model, prompts: Path, out: Path, **changes: Any) -> BulkResult:
    decode = Decode(**OPTIONS | {key: value for key, value in changes.items() if key != "seed"})
    listed = read_prompt_file(prompts, is_chat=False)
    return generate_file(model, listed, out, decode, seed=changes.get("seed", 0), checkpoint="tiny")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_file_holds_what_one_call_gives(model: Model, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert complete(model, prompts, out) == BulkResult(len(TEXTS), 0)
    found = records(out)
    assert [record["index"] for record in found] == list(range(len(TEXTS)))
    assert [record["prompt"] for record in found] == TEXTS
    expected = model.generate(TEXTS, **OPTIONS)
    assert [record["tokens"] for record in found] == [completion.tokens for completion in expected]
    assert [record["text"] for record in found] == [completion.text for completion in expected]
    assert found[1]["tokens"] != found[5]["tokens"]  # equal prompts draw different numbers


@pytest.mark.parametrize("num_lines", [0, 1, 6, 10])
@pytest.mark.parametrize("tail", ["", '{"index": 4, "id', "\x00\x00"])
def test_a_run_goes_on_where_it_was_cut(model: Model, prompts: Path, tmp_path: Path, num_lines: int, tail: str) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    complete(model, prompts, whole)
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(reversed(lines[len(lines) - num_lines :])) + tail)
    heard: list[tuple[int, int]] = []
    result = generate_file(
        model,
        read_prompt_file(prompts, is_chat=False),
        cut,
        Decode(**OPTIONS | {"batch_size": 2}),
        seed=0,
        checkpoint="tiny",
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert result == BulkResult(len(TEXTS), num_lines)
    got, expected = records(cut), records(whole)
    for one, other in zip(got, expected, strict=True):
        assert one.pop("logp") == pytest.approx(other.pop("logp"), abs=1e-5)
        assert one == other
    assert heard == sorted(heard)
    assert not heard or heard[-1][0] == heard[-1][1]


KILLED = """
import os, signal, sys
from pathlib import Path
from dare.core.decode import Decode
from dare.core.files import JsonLines
from dare.model import load
from dare.terminal.bulk import generate_file
from dare.terminal.settings import read_prompt_file
write, num = JsonLines.write, 0
def fatal(self, record):
    global num
    write(self, record)
    num += 1
    if num == 4:
        self._file.write(b'{"index": 9, "half a li')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
JsonLines.write = fatal
checkpoint, prompts, out = sys.argv[1:]
options = dict(gen_length=8, block_length=4, temperature=1.0, batch_size=3)
listed = read_prompt_file(Path(prompts), is_chat=False)
generate_file(load(checkpoint), listed, Path(out), Decode(**options), seed=0, checkpoint="tiny")
"""


def test_nothing_is_lost_or_repeated_after_kill_9(
    model: Model, tiny_checkpoints: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = [sys.executable, "-c", KILLED, str(tiny_checkpoints["sdar"]), str(prompts), str(out)]
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert out.read_bytes().count(b"\n") == 4
    assert complete(model, prompts, out) == BulkResult(len(TEXTS), 4)
    complete(model, prompts, whole)
    assert [record["tokens"] for record in records(out)] == [record["tokens"] for record in records(whole)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}, {"gen_length": 12}], ids=str)
def test_lines_of_another_run_are_not_taken_for_these(
    model: Model, prompts: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "out.jsonl"
    complete(model, prompts, out)
    before = out.read_bytes()
    with pytest.raises(DareError, match="other prompts, options, weights or another seed") as caught:
        complete(model, prompts, out, **change)
    assert "out.jsonl:1" in str(caught.value)
    assert out.read_bytes() == before


def test_a_foreign_or_doubled_line_is_an_error(model: Model, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    complete(model, prompts, out)
    lines = out.read_text().splitlines(keepends=True)
    for text, number in ((lines[0] + "notes\n", 2), (lines[0] + lines[1] + lines[0], 3), ('{"index": "x"}\n', 1)):
        out.write_text(text)
        with pytest.raises(DareError) as caught:
            complete(model, prompts, out)
        assert f"out.jsonl:{number}" in str(caught.value)
        assert out.read_text() == text


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(model: Model, prompts: Path, tmp_path: Path) -> None:
    with prompts.open("a") as file:
        file.write("\n" + json.dumps({"prompt": "7" * 90}) + "\n")
    with pytest.raises(DareError, match="longer than the model") as caught:
        complete(model, prompts, tmp_path / "out.jsonl")
    assert f"prompts.jsonl:{len(TEXTS) + 2}" in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command(tiny_checkpoints: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out.jsonl", tiny_checkpoints["llada"]
    words = ("generate", checkpoint, "--file", prompts, "--out", out, "gen_length=4", "block_length=4")
    first, second = invoke(*words), invoke(*words)
    assert first.exit_code == second.exit_code == 0
    assert first.output.strip().endswith("out.jsonl: 10 completions")
    assert second.output.strip().endswith("out.jsonl: 10 completions, 10 of them from before")
    for wrong, message in (
        (("--file", prompts, "--out", prompts), "would replace the prompts"),
        (("--prompt", "1", "--out", out), "give --file and no prompts"),
        (
            ("--file", prompts, "--out", tmp_path / "no" / "out.jsonl", "gen_length=4", "block_length=4"),
            "does not exist",
        ),
        (("--file", prompts, "--out", tmp_path / "x.jsonl", "gen_lenght=4"), "gen_length"),
    ):
        result = invoke("generate", checkpoint, *wrong)
        assert result.exit_code == 2, message
        assert message in result.output
