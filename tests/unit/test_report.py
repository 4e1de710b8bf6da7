"""Reports of small hand-made run folders."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.evals.intervals import wilson
from dare.report.build import build_report
from dare.report.comparison import compare, difference
from dare.report.curves import Chart, Series, charts
from dare.report.drawing import HEIGHT, WIDTH, draw, ticks
from dare.report.page import render
from dare.report.run_data import RunData, earlier_stage, load_run
from dare.report.samples import orders, pairs

NASTY = "<script>alert(1)</script>|`$x$`\x1b[31m\u2028\u202e{{ 7*7 }}"


def evaluation(step: int, num_solved: int, num: int = 200, **decode: Any) -> dict[str, Any]:
    low, high = wilson(num_solved, num)
    return {
        "step": step,
        "task": "countdown",
        "split": "eval",
        "num": num,
        "num_solved": num_solved,
        "solve_rate": num_solved / num,
        "low": low,
        "high": high,
        "reward_mean": num_solved / num + 0.1,
        "nfe": 8.0,
        "tokens_per_forward": 1.25,
        "eos_rate": 0.98,
        "truncation_rate": 0.02,
        "decode": {"temperature": 0.0, "gen_length": 16, **decode},
    }


def sample(step: int, uid: int, completion: str, *, is_solved: bool, split: str = "eval") -> dict[str, Any]:
    tokens = list(completion)
    return {
        "step": step,
        "split": split,
        "uid": f"countdown/eval/{uid}",
        "prompt": f"{uid + 2} {uid + 5} 7>22=",
        "completion": completion,
        "reward": 1.0 if is_solved else 0.1,
        "parts": {"correct": float(is_solved), "format": 1.0},
        "is_solved": is_solved,
        "tokens": tokens,
        "step_map": [(5 * index) % max(len(tokens), 1) for index in range(len(tokens))],
        "logp": [-0.1 * index for index in range(len(tokens))],
        "block": [index // 4 for index in range(len(tokens))],
    }


def step_metrics(step: int, num_steps: int) -> dict[str, float]:
    done = step / num_steps
    return {
        "step": step,
        "loss": 0.02 * math.sin(step) + 0.05 * (1 - done),
        "reward": 0.2 + 0.5 * done + 0.05 * math.sin(7 * step),
        "solve_rate": 0.15 + 0.5 * done + 0.06 * math.sin(5 * step),
        "kl": 0.001 * step + 0.002 * abs(math.sin(step)),
        "ratio": 1.0 + 0.01 * math.sin(step),
        "grad_norm": 0.5 + 0.2 * math.sin(3 * step),
        "completion_length": 9.0 - 2 * done,
        "eos_rate": 0.9 + 0.1 * done,
        "truncation_rate": 0.1 - 0.1 * done,
        "zero_variance_groups": 0.3 * done,
        "tokens_per_forward": 1.0 + 0.2 * done,
        "nfe": 8.0,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(path: Path, num_steps: int = 60, *, model_path: str | None = None, status: str = "finished") -> Path:
    """A reinforcement-learning run as `dare train` would leave it."""
    path.mkdir(parents=True)
    model = {"path": model_path} if model_path else {"create": {"family": "llada"}}
    recipe = {
        "name": "tiny-llada-rl",
        "seed": 3,
        "model": model,
        "algorithm": {"name": "espo"},
        "task": {"name": "countdown"},
        "train": {"steps": num_steps},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    info = {
        "status": status,
        "name": "tiny-llada-rl",
        "seconds": 412.3,
        "versions": {"torch": "2.8.0"},
        "machine": {"system": "Linux-6", "cpu_threads": 2},
    }
    (path / "run.json").write_text(json.dumps(info))
    write_lines(path / "metrics.jsonl", [step_metrics(step, num_steps) for step in range(1, num_steps + 1)])
    timing = {"seconds": 3.0, "rollout_s": 1.8, "reward_s": 0.1, "update_s": 1.1, "tokens_per_s": 2100.0}
    write_lines(
        path / "timing.jsonl",
        [{"step": step, **timing, "peak_memory_mb": 900.0} for step in range(1, num_steps + 1)],
    )
    write_lines(
        path / "eval.jsonl",
        [evaluation(step, 27 + 95 * step // num_steps) for step in range(0, num_steps + 1, num_steps // 3)],
    )
    texts = ("(3+5)*7-1", "7*3+1", "2+8*7", "(9-2)*3+1")
    first = [sample(0, uid, "7+7" if uid else NASTY, is_solved=False) for uid in range(4)]
    last = [sample(num_steps, uid, text if uid else NASTY, is_solved=uid != 1) for uid, text in enumerate(texts)]
    write_lines(path / "samples.jsonl", first + last)
    return path


def write_sft(path: Path, num_steps: int = 40) -> Path:
    """A supervised run: a loss, one evaluation at the end, no samples."""
    path.mkdir(parents=True)
    recipe = {
        "name": "tiny-llada-sft",
        "model": {"create": {"family": "llada"}},
        "algorithm": {"name": "sft"},
        "task": {"name": "countdown"},
        "train": {"steps": num_steps},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "run.json").write_text(json.dumps({"status": "finished", "name": "tiny-llada-sft"}))
    write_lines(
        path / "metrics.jsonl",
        [{"step": step, "loss": 3.0 / step + 0.4, "grad_norm": 1.0 / step} for step in range(1, num_steps + 1)],
    )
    write_lines(path / "eval.jsonl", [evaluation(0, 0), evaluation(num_steps, 27)])
    return path


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

    VOID: ClassVar[set[str]] = {"meta", "line", "circle", "path", "br"}

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


def test_line_separators_in_completions_are_no_line_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=6)
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(sample(6, 9, "a\u2028b\x85c", is_solved=True), ensure_ascii=False) + "\n")
    assert load_run(run).samples[-1]["completion"] == "a\u2028b\x85c"


def test_steps_without_a_finite_value_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=6)
    lines = [{"step": step, "loss": math.nan if step in (2, 5) else 1.0} for step in range(1, 7)]
    write_lines(run / "metrics.jsonl", lines)
    (loss,) = [chart for chart in charts(load_run(run)) if chart.title == "Loss"]
    assert loss.series[0].steps == [1, 3, 4, 6]
    assert loss.note == "2 steps without a finite value are left out"


def test_mistakes_are_named(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(DareError, match="not a run folder"):
        build_report(tmp_path / "nothing", tmp_path / "report")
    with pytest.raises(DareError, match="not a run folder"):
        build_report(runs / "rl", tmp_path / "report", baseline=tmp_path)
    run = write_run(tmp_path / "run", num_steps=6)
    (run / "eval.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(DareError, match=r"eval\.jsonl"):
        build_report(run, tmp_path / "report")
    assert not (tmp_path / "report").exists()


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


def test_earlier_stage_is_found_from_anywhere(tmp_path: Path) -> None:
    sft = write_sft(tmp_path / "a" / "sft")
    for index, path in enumerate([str(sft), str(sft / "checkpoints" / "step-000040")]):
        assert earlier_stage(load_run(write_run(tmp_path / f"rl{index}", 6, model_path=path))) == sft
    moved = load_run(write_run(tmp_path / "a" / "rl", 6, model_path="gone/sft/checkpoints/step-000040"))
    assert earlier_stage(moved) == sft.resolve()
    assert earlier_stage(load_run(write_run(tmp_path / "hub", 6, model_path="GSAI-ML/LLaDA-8B-Base"))) is None
    assert earlier_stage(load_run(sft)) is None


def test_difference_is_newcombes() -> None:
    """Newcombe 1998, Statistics in Medicine 17:873-890, table II, example (a), method 10: 56/70 - 48/80."""
    change = difference(evaluation(0, 48, 80), evaluation(1, 56, 70))
    assert change.value == pytest.approx(0.2)
    assert (change.low, change.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_difference_holds_its_value_and_flips(num_a: int, num_b: int, data: st.DataObject) -> None:
    a = evaluation(0, data.draw(st.integers(0, num_a)), num_a)
    b = evaluation(1, data.draw(st.integers(0, num_b)), num_b)
    there, back = difference(a, b), difference(b, a)
    assert -1 - 1e-12 <= there.low <= there.value <= there.high <= 1 + 1e-12
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))


def test_unequal_settings_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    write_lines(run / "eval.jsonl", [evaluation(0, 10), evaluation(6, 50, temperature=0.7, batch_size=9)])
    comparison = compare(load_run(run), None)
    assert comparison.change is None
    assert comparison.differing == ["decode.temperature: 0.0 → 0.7"]
    assert "cannot be compared: decode.temperature" in page_text(run)


def test_before_is_the_runs_own_start_if_it_has_one(tmp_path: Path) -> None:
    sft, rl = load_run(write_sft(tmp_path / "sft")), load_run(write_run(tmp_path / "rl", 6))
    labels = [row.label for row in compare(rl, sft).rows]
    assert labels == ["tiny-llada-sft, step 40", "before: step 0", "after: step 6"]
    write_lines(tmp_path / "rl" / "eval.jsonl", [evaluation(6, 122)])
    comparison = compare(load_run(tmp_path / "rl"), sft)
    assert [row.label for row in comparison.rows] == ["tiny-llada-sft, step 40", "after: step 6"]
    assert comparison.change is not None


VALUES = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(VALUES, min_size=1, max_size=20), st.sampled_from(["percent", "number"]))
def test_drawing_stays_inside(values: list[float], unit: Any) -> None:
    if unit == "percent":
        values = [abs(value) / 1e9 for value in values]
    drawing = draw(Chart("t", unit, [Series("s", list(map(float, range(len(values)))), values, is_points=True)]))
    for x, y, _ in drawing.strokes[0].points:
        assert drawing.left <= x <= drawing.right <= WIDTH
        assert drawing.top <= y <= drawing.bottom <= HEIGHT
    positions = [tick.position for tick in drawing.y_ticks]
    assert positions == sorted(positions, reverse=True)
    assert all(drawing.top <= position <= drawing.bottom for position in positions)


@given(VALUES, st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    if low + width > low + width * 0.99:  # wide enough for floats to tell apart
        found = ticks(low, low + width, 4)
        assert len(found) <= 9
        assert all(low - 1e-6 * width <= value <= low + width * 1.000001 for value in found)


@given(st.integers(1, 2000))
def test_long_curves_are_averaged(num: int) -> None:
    records = [{"step": step, "loss": float(step)} for step in range(1, num + 1)]
    run = RunData(Path("run"), {}, "", {}, records, [], [], [])
    series = charts(run)[0].series[0]
    assert len(series.values) <= 300
    assert series.values == pytest.approx(series.steps)  # a mean of a line lies on the line


def test_orders_show_steps_blocks_and_gaps() -> None:
    record = {**sample(9, 0, "abcdef", is_solved=True), "step_map": [4, 0, 0, 7, -2, 4], "block": [0, 0, 0, 1, 1, 1]}
    (order,) = orders([record], 3)
    assert order.title == "6 tokens in 3 steps, reward 1"
    assert [cell.step for cell in order.cells] == [5, 1, 1, 8, None, 5]
    assert [cell.shade for cell in order.cells] == [3, 0, 0, 7, None, 3]
    assert [cell.has_border for cell in order.cells] == [False, False, False, True, False, False]
    assert order.cells[4].hover == "not sampled"
    assert order.cells[3].hover == "step 8, log-prob -0.300"


def test_pairs_are_joined_by_problem_and_not_selected() -> None:
    first = [sample(0, uid, f"before {uid}", is_solved=False) for uid in (2, 0)]
    last = [sample(9, uid, f"after {uid}", is_solved=uid == 1) for uid in (0, 1, 2)]
    rollouts = [sample(9, 7, "rollout", is_solved=True, split="train")]
    found = pairs(first + last + rollouts, 2)
    assert [pair.after["completion"] for pair in found] == ["after 0", "after 1"]
    assert [pair.before and pair.before["completion"] for pair in found] == ["before 0", None]
    assert [pair.after["completion"] for pair in pairs(rollouts, 5)] == ["rollout"]
    assert pairs([], 5) == []
