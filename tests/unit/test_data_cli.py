"""`dare data inspect` and `dare data check`: what they show, and what they say about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dare.cli import app
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.data.rows import EncodedRow
from dare.terminal.data import histogram
from dare.training.inspection import noisy_copies
from tests.unit.test_data import MASK, SPEC

GOOD = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in ((1, 2), (30, 4), (5, 66))]


def data(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", *(str(word) for word in words)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    return path


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_inspect_shows_loss_noise_lengths_and_padding(
    family: str, rows: Path, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plot = tmp_path / "lengths.png"
    words = ("inspect", rows, "data.eos=one", "--model", tiny_checkpoints[family], "--num", 1, "--plot", plot)
    shown = data(*words)
    assert shown.exit_code == 0, shown.output
    assert "rows.jsonl/0  4 prompt + 2 completion tokens, 2 carry loss" in shown.stdout
    assert "· · · · ^ ^^^^^" in shown.stdout
    assert [line[:8] for line in shown.stdout.splitlines() if line.startswith("t = ")] == [
        f"t = {t}0" for t in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert "whole row: mean 7.3, median 8, 95 % within 8, longest 8, shortest 6 tokens" in shown.stdout
    assert "no row was skipped, dropped or cut" in shown.stdout
    assert "padding: 8.3 % of all positions in 1 micro-batches" in shown.stdout
    assert "packed, train.pack_length=4096: none, in 1 forwards" in shown.stdout
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert data(*words).stdout == shown.stdout  # noise is keyed


def test_inspect_counts_what_is_skipped_cut_and_dropped(rows: Path, tiny_checkpoints: dict[str, Path]) -> None:
    with rows.open("a") as file:
        file.write("{oops\n")
    model = ("--model", tiny_checkpoints["llada"])
    refused = data("inspect", rows, *model, "data.eos=one")
    assert refused.exit_code == 2
    assert "line 4" in refused.output
    words = ("inspect", rows, *model, "data.eos=one", "data.on_bad_row=skip", "data.max_length=7")
    cut = data(*words, "data.on_too_long=left")
    assert "1 of 4 rows are malformed and were skipped; the first one: not valid JSON" in cut.stdout
    assert "2 of 4 rows are too long and were cut" in cut.stdout
    assert "lengths of all 3 rows" in cut.stdout
    first = data(*words, "data.on_too_long=left", "--max-rows", 1)
    assert "lengths of the first 1 rows" in first.stdout
    dropped = data(*words, "data.on_too_long=drop")
    assert "2 of 4 rows are too long and were dropped" in dropped.stdout
    assert "lengths of all 1 rows" in dropped.stdout


def test_inspect_takes_pairs_and_prompts_and_recipes(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    model = ("--model", tiny_checkpoints["sdar"])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}) + "\n")
    shown = data("inspect", pairs, *model)
    assert "pairs.jsonl/0/chosen  4 prompt + 4 completion tokens" in shown.stdout
    assert "pairs.jsonl/0/rejected  4 prompt + 4 completion tokens" in shown.stdout
    pairs.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    shown = data("inspect", pairs, *model)
    assert shown.exit_code == 0, shown.output
    assert "4 prompt + 0 completion tokens" in shown.stdout
    assert "noise" not in shown.stdout
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: r\nmodel: {{create: {{family: llada}}}}\nalgorithm: sft\ndata: {{path: {pairs}}}\n")
    pairs.write_text(json.dumps(GOOD[0]) + "\n")
    shown = data("inspect", recipe, *model, "data.eos=one")
    assert "pairs.jsonl/0  4 prompt + 2 completion tokens" in shown.stdout


def test_inspect_says_what_is_missing(rows: Path, tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    for words, message in (
        ((rows,), "give --model CHECKPOINT, or a recipe"),
        ((tmp_path / "no.jsonl", "--model", tiny_checkpoints["llada"]), "data file not found"),
        ((rows, "--model", tiny_checkpoints["llada"], "--plot", "a.txt"), ".png or .svg"),
        ((rows, "--model", tiny_checkpoints["llada"], "data.eoss=one"), "did you mean 'eos'"),
        ((rows, "--model", tiny_checkpoints["llada"], "data.eos"), "key=value"),
    ):
        result = data("inspect", *words)
        assert result.exit_code == 2
        assert message in result.output


def test_check_lists_every_error_with_its_line(rows: Path) -> None:
    assert data("check", rows).stdout == "3 rows: 0 wrong\n"
    with rows.open("ab") as file:
        file.write(b'{"prompt": "p"}\n\n{"prompt": "\xff", "completion": "c"}\n{"messages": []}\n{"prompt": 1}\n')
    result = data("check", rows)
    assert result.exit_code == 2
    for line, message in ((4, "no completion"), (6, "not valid JSON"), (7, "no prompt"), (8, "prompt is malformed")):
        assert f"{message}\n  where: {rows}, line {line}\n" in result.stdout
    assert result.stdout.endswith("7 rows: 4 wrong\n")
    short = data("check", rows, "--max-errors", 1)
    assert "... and 3 more; --max-errors lists them" in short.stdout
    assert short.stdout.endswith("7 rows: 4 wrong\n")


def test_check_with_a_model_finds_what_only_tokens_show(rows: Path, tiny_checkpoints: dict[str, Path]) -> None:
    with rows.open("a") as file:
        for prompt, completion in (("1é", "2"), ("1" * 200, "2"), ("1", "2")):
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    assert data("check", rows).exit_code == 0
    result = data("check", rows, "--model", tiny_checkpoints["llada"], "data.eos=one")
    assert result.exit_code == 2
    assert "'é' is not in the vocabulary" in result.stdout
    assert f"too long\n  where: {rows}, line 5" in result.stdout
    assert result.stdout.endswith("6 rows: 0 to drop, 0 to cut, 2 wrong\n")
    result = data("check", rows, "--model", tiny_checkpoints["llada"], "data.eos=one", "data.on_too_long=drop")
    assert result.stdout.endswith("6 rows: 1 to drop, 0 to cut, 1 wrong\n")


def test_check_knows_the_options_it_is_given(rows: Path, tmp_path: Path) -> None:
    rows.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    assert data("check", rows, "data.columns={prompt: question, completion: answer}").exit_code == 0
    assert "no known columns" in data("check", rows).output
    assert "did you mean 'columns'" in data("check", rows, "data.colums={}").output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{name: r, model: {create: {family: llada}}, algorithm: sft, task: chain_sum}")
    assert "there are no rows to check" in data("check", recipe).output


# Parts


def test_noise_masks_more_at_higher_levels_and_only_what_carries_loss() -> None:
    row = EncodedRow("row", [1] * 5, [2] * 400, [place >= 100 for place in range(400)])
    spec: FamilySpec = SPEC
    low, high = noisy_copies(row, spec, (0.2, 0.8), Key(0))
    assert low[:105] == high[:105] == [1] * 5 + [2] * 100
    assert 30 < low.count(MASK) < 90
    assert 210 < high.count(MASK) < 270
    assert all(later == MASK for earlier, later in zip(low, high, strict=True) if earlier == MASK)


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [1, 2, 3, 50], list(range(7, 100))])
def test_a_histogram_counts_every_length_once(lengths: list[int]) -> None:
    bins = histogram(lengths, 12)
    assert sum(count for _, _, count in bins) == len(lengths)
    assert len(bins) <= 12
    assert bins[0][0] == min(lengths)
    assert bins[-1][0] <= max(lengths) <= bins[-1][1]
