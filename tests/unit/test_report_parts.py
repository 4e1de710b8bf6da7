"""The parts of a report: comparison, curves, drawing, samples."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.recipe import load_recipe
from dare.report.build import live_page
from dare.report.comparison import compare, difference
from dare.report.curves import Chart, Series, charts
from dare.report.drawing import HEIGHT, WIDTH, draw, ticks
from dare.report.markdown import render_markdown
from dare.report.reference import find_reference
from dare.report.run_data import RunData, earlier_stage, load_run
from dare.report.samples import orders, pairs
from tests.unit.report_runs import evaluation, sample, write_lines, write_run, write_sft

ROOT = Path(__file__).parents[2]
REFERENCES = sorted((ROOT / "benchmarks" / "results" / "reference").glob("*.json"))
VALUES = st.floats(-1e9, 1e9, allow_nan=False)


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


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_difference_holds_its_value_and_flips(num_a: int, num_b: int, data: st.DataObject) -> None:
    a = evaluation(0, data.draw(st.integers(0, num_a)), num_a)
    b = evaluation(1, data.draw(st.integers(0, num_b)), num_b)
    there, back = difference(a, b), difference(b, a)
    assert -1 - 1e-12 <= there.low <= there.value <= there.high <= 1 + 1e-12
    assert (back.low, back.high) == (pytest.approx(-there.high), pytest.approx(-there.low))
    assert there.includes_zero or there.value != 0


def test_unequal_settings_are_not_compared(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    write_lines(run / "eval.jsonl", [evaluation(0, 10), evaluation(6, 50, temperature=0.7, batch_size=9)])
    comparison = compare(load_run(run), None)
    assert comparison.change is None
    assert comparison.differing == ["decode.temperature: 0.0 → 0.7"]


def test_before_is_the_runs_own_start_if_it_has_one(tmp_path: Path) -> None:
    sft, rl = load_run(write_sft(tmp_path / "sft")), load_run(write_run(tmp_path / "rl", 6))
    labels = [row.label for row in compare(rl, sft).rows]
    assert labels == ["tiny-llada-sft, step 40", "before: step 0", "after: step 6"]
    write_lines(tmp_path / "rl" / "eval.jsonl", [evaluation(6, 122)])
    comparison = compare(load_run(tmp_path / "rl"), sft)
    assert [row.label for row in comparison.rows] == ["tiny-llada-sft, step 40", "after: step 6"]
    assert comparison.change is not None


@settings(deadline=None)
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


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e9))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width, 4)
    assert 2 <= len(found) <= 7
    assert found == sorted(set(found))
    assert all(low - 1e-6 * width <= value <= low + 1.000001 * width for value in found)


@settings(deadline=None)
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


def test_rows_that_nobody_judges_are_shown_with_their_answers(tmp_path: Path) -> None:
    """A fine-tuning run on data has completions to look at, but no reward: nothing about them is damaged."""
    run = write_sft(tmp_path / "run")
    for step in (20, 40):
        record = {"step": step, "split": "shown", "uid": "a", "prompt": "2+2=", "completion": f"at {step}\nor so"}
        with (run / "samples.jsonl").open("a") as file:
            file.write(json.dumps({**record, "reference": "4", "tokens": ["at"], "step_map": [0]}) + "\n")
    data = load_run(run)
    assert data.unread == []
    (pair,) = pairs(data.samples, 5)
    assert pair.before is not None
    assert (pair.before["step"], pair.after["step"]) == (20, 40)
    page = live_page(run)
    assert "at 40\nor so" in page
    assert "in the data: <code>4</code>" in page
    assert "solved</span>" not in page
    assert "| ` 2+2= ` | ` at 40⏎or so ` | – | – |" in render_markdown(data, compare(data, None))


@pytest.mark.parametrize(
    ("written_by", "is_newer"), [("99.1", True), ("0.0.9", False), ("0.1.0.dev3", False), ("", False)]
)
def test_a_newer_run_is_called_newer(tmp_path: Path, written_by: str, is_newer: bool) -> None:
    run = write_run(tmp_path / "run")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"versions": {"dare-dllm": written_by}}))
    notes = [note for note in load_run(run).missing if "newer" in note]
    assert len(notes) == is_newer
    assert all(written_by in note for note in notes)


def test_curves_in_an_order_have_a_colour_each(tmp_path: Path) -> None:
    run = write_sft(tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    levels = {f"nll_at/{low}-{low + 20}": 0.1 + low / 100 for low in range(0, 100, 20)}
    write_lines(run / "metrics.jsonl", [record | levels for record in records])
    (chart,) = (chart for chart in charts(load_run(run)) if "noise" in chart.title)
    drawing = draw(chart)
    assert [stroke.label for stroke in drawing.strokes] == [f"{low}-{low + 20} %" for low in range(0, 100, 20)]
    assert len({stroke.tone for stroke in drawing.strokes}) == 5
    assert drawing.latest == ""
    page = live_page(run)
    assert all(f".{stroke.tone} {{" in page for stroke in drawing.strokes)  # every tone has a colour


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_shipped_references_are_those_of_the_shipped_recipes(path: Path, tmp_path: Path) -> None:
    """Otherwise a report would silently draw none. Options that came later have their defaults."""
    record = json.loads(path.read_text())
    recipe = load_recipe(ROOT / re.findall(r"recipes/\S+\.yaml", record["made_with"])[0])
    run = write_run(tmp_path / "run", num_steps=6)
    data = recipe.model_dump(mode="json")
    open_options = {
        key for key, value in data["algorithm"].items() if value in (None, "auto")
    }  # the family fills them in
    data["algorithm"] |= {key: record["algorithm"][key] for key in open_options}
    (run / "recipe.yaml").write_text(yaml.safe_dump(data))
    (run / "run.json").unlink()
    found = find_reference(load_run(run))
    assert found is not None
    assert [e["step"] for e in found.evaluations][-1] == recipe.train.steps
    (run / "recipe.yaml").write_text(yaml.safe_dump(data | {"decode": data["decode"] | {"gen_length": 9}}))
    assert find_reference(load_run(run)) is None
