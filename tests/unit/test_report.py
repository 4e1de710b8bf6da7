"""Report pages of small run folders: complete, safe, whole or absent."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

from dare.core.errors import DareError
from dare.report.build import build_report
from dare.report.comparison import compare
from dare.report.page import render
from dare.report.run_data import load_run
from tests.unit.report_runs import evaluation, write_lines, write_run, write_sft


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SFT run, an RL run from its checkpoint, and the report of the RL run."""
    root = tmp_path_factory.mktemp("runs")
    checkpoint = write_sft(root / "sft") / "checkpoints" / "step-000040"
    checkpoint.mkdir(parents=True)
    write_run(root / "rl", model_path=str(checkpoint))
    build_report(root / "rl", root / "report")
    return root


class Page(HTMLParser):
    """Text and attributes of a page; fails on unbalanced tags."""

    VOID: ClassVar[set[str]] = {"meta", "line", "circle", "path", "br", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag == "td":
            self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def page_text(run_dir: Path) -> str:
    run = load_run(run_dir)
    return Page(render([run], compare(run, None))).text


def test_page_is_self_contained(runs: Path) -> None:
    page = read_page(runs / "report")
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    css = (runs / "report" / "index.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in css
    assert "url(" not in css
    assert "prefers-color-scheme: dark" in css


def test_page_has_the_numbers(runs: Path) -> None:
    text = " ".join(read_page(runs / "report").text.split())
    assert "13.5% → 61.0% solved, a change of +47.5 points (95% interval +38.7 to +55.2)" in text
    assert "27 / 200 13.5% 9.4% – 18.9%" in text
    assert "122 / 200 61.0% 54.1% – 67.5%" in text
    assert "rollout 60.0%" in text
    assert "3m00s in 60 steps, median 3.0s" in text


def test_earlier_stage_comes_first(runs: Path) -> None:
    text = read_page(runs / "report").text
    assert text.index("Stage 1: tiny-llada-sft") < text.index("Stage 2: tiny-llada-rl")


def test_what_a_model_writes_is_only_text(runs: Path) -> None:
    html = (runs / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert not set("\x1b\u2028\u202e") & set(html)
    assert "<script>alert(1)</script>|`$x$`\\x1b[31m\\u2028\\u202e{{ 7*7 }}" in Page(html).text


def test_markdown_tables_hold_together(runs: Path) -> None:
    lines = (runs / "report" / "report.md").read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables[:4]} == {11}
    assert {line.count("|") for line in tables[4:]} == {5}
    assert "13.5% → **61.0%** solved: +47.5 points (95% interval +38.7 to +55.2)." in lines


def test_unclear_change_is_called_so(tmp_path: Path, runs: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    write_lines(run / "eval.jsonl", [evaluation(0, 40), evaluation(6, 44)])
    assert "which includes no change" in page_text(run)
    assert "which includes no change" not in page_text(runs / "rl")


def test_unequal_settings_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    write_lines(run / "eval.jsonl", [evaluation(0, 10), evaluation(6, 50, temperature=0.7)])
    assert "cannot be compared: decode.temperature: 0.0 → 0.7" in page_text(run)


def test_plots_are_images(runs: Path) -> None:
    assert (runs / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (runs / "report" / "curves.svg").read_text()
    assert "held out, 95% interval" in svg
    assert "Loss" in svg


def test_equal_runs_give_equal_reports(runs: Path) -> None:
    for out in ("one", "two"):
        build_report(runs / "sft", runs / out)
    for name in ("index.html", "report.md", "curves.svg", "curves.png"):
        assert (runs / "one" / name).read_bytes() == (runs / "two" / name).read_bytes()


def test_report_of_a_run_without_any_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: empty\n")
    page = read_page(build_report(tmp_path / "run", tmp_path / "report"))
    assert "No curve yet." in page.text
    assert "no training step" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("kept", [["recipe.yaml"], ["metrics.jsonl"], ["recipe.yaml", "eval.jsonl"]], ids="+".join)
def test_incomplete_runs_say_what_is_missing(tmp_path: Path, kept: list[str]) -> None:
    run = write_run(tmp_path / "run", num_steps=6)
    for file in run.iterdir():
        if file.name not in kept:
            file.unlink()
    text = page_text(run)
    assert "run.json is missing" in text
    assert ("no training step" in text) == ("metrics.jsonl" not in kept)
    assert ("no held-out evaluation" in text) == ("eval.jsonl" not in kept)
    assert "no sample completions" in text


def test_running_run_with_half_a_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=6, status="running")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    text = page_text(run)
    assert "still running: step 6 of 6" in text
    assert "so far: step 6" in text


def test_mistakes_are_named(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(DareError, match="not a run folder"):
        build_report(tmp_path / "nothing", tmp_path / "report")
    with pytest.raises(DareError, match="not a run folder"):
        build_report(runs / "rl", tmp_path / "report", baseline=tmp_path)
    assert not (tmp_path / "report").exists()


def test_what_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=6)
    good = (run / "eval.jsonl").read_text()
    (run / "eval.jsonl").write_text(good + '{"step": 7}\nnonsense\n')
    (run / "samples.jsonl").write_text('{"step": 1, "novelty": [1]}\n[1]\n')
    (run / "run.json").write_text("{")
    text = page_text(run)
    assert "2 lines of eval.jsonl cannot be read" in text
    assert "2 lines of samples.jsonl cannot be read" in text
    assert "run.json cannot be read" in text
    assert "after: step 6" in text or "so far: step 6" in text
    (run / "recipe.yaml").write_text("- a list\n")
    assert "recipe.yaml is not a recipe" in page_text(run)
    (run / "recipe.yaml").write_text("name: x\nalgorithm: spg\ntrain: {steps: many}\n")
    assert "recipe.yaml: algorithm cannot be read" in page_text(run)
    build_report(run, tmp_path / "report")


def test_only_a_report_is_ever_replaced(tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "report", tmp_path / "report")
    (tmp_path / "report" / "index.html").write_text("old")
    build_report(runs / "sft", tmp_path / "report")
    assert (tmp_path / "report" / "index.html").read_text() != "old"
    (tmp_path / "report" / "thesis.tex").write_text("years of work")
    with pytest.raises(DareError, match=r"thesis\.tex"):
        build_report(runs / "rl", tmp_path / "report")
    with pytest.raises(DareError, match="other files"):
        build_report(runs / "rl", runs / "rl")
    assert (tmp_path / "report" / "thesis.tex").exists()
