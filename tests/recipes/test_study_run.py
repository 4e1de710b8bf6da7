"""A whole study, with real processes: run, resumed after damage, reported; nothing that is done is done again."""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
from pathlib import Path

import pytest
import yaml

from dare.core.data_recipe import DataRecipe
from dare.core.errors import DareError
from dare.studies.build import build_study_report
from dare.studies.run import cell_folder, recorded_cells, run_study
from dare.studies.study import load_study

SMOKE = Path(__file__).parents[2] / "recipes" / "studies" / "smoke.yaml"


def small_study(tmp_path: Path, **changes: object) -> Path:
    """The shipped smoke study with less of everything."""
    data = yaml.safe_load(SMOKE.read_text())
    data["recipe"]["train"] = {"prompts_per_step": 4, "completions_per_prompt": 4}
    data["recipe"]["evaluation"] = {"num": 32}
    data["tasks"]["countdown"]["recipe"]["task"] |= {"train_size": 64, "eval_size": 32}
    data["families"]["llada"]["start"] = str(SMOKE.parent / data["families"]["llada"]["start"])
    data["families"]["llada"]["start_recipe"]["train"] = {"steps": 3, "batch_size": 16}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


@pytest.mark.slow
def test_a_study_runs_resumes_and_reports(tmp_path: Path) -> None:
    plan = load_study(small_study(tmp_path, budget={"forwards": 700}))
    out, said = tmp_path / "out", []
    cells = run_study(plan, out, 2, said.append)
    assert len({cell.recipe.model.path for cell in cells}) == 1
    report = build_study_report(plan, cells, out)
    rows = list(csv.DictReader((report / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 4
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["forwards"]) <= 1.6 * 700
        assert int(row["steps"]) == cell.recipe.train.steps
    assert recorded_cells(plan, out) == cells
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/metrics.jsonl")}
    done, broken = cell_folder(out, cells[0]), cell_folder(out, cells[1])
    shutil.rmtree(broken)
    said.clear()
    run_study(plan, out, 2, said.append)
    assert any("3 of 4 are done already" in line for line in said)
    assert (done / "metrics.jsonl").stat().st_mtime_ns == before[done / "metrics.jsonl"]
    again = json.loads((build_study_report(plan, cells, out) / "results.json").read_text())["runs"]
    solved = [run["curve"][-1]["solve_rate"] for run in again]
    assert solved == [float(row["solve_rate"]) for row in rows]  # the rerun gives the same numbers


def test_one_process_at_a_time(tmp_path: Path) -> None:
    plan, out = load_study(small_study(tmp_path)), tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DareError, match="another process"):
            run_study(plan, out, 1, print)
        assert recorded_cells(plan, out) == plan.cells  # to look is allowed meanwhile


@pytest.mark.slow
def test_a_start_that_fails_ends_the_study(tmp_path: Path) -> None:
    plan = load_study(small_study(tmp_path))
    (panel,) = plan.panels
    start = plan.starts[panel]
    broken = start.model_copy(update={"data": DataRecipe(path="nowhere.jsonl")})  # type: ignore[union-attr]
    plan.starts[panel] = broken
    with pytest.raises(DareError, match="start checkpoint could not be trained"):
        run_study(plan, tmp_path / "out", 1, print)
    assert "nowhere.jsonl" in (tmp_path / "out" / "logs" / "start_llada_countdown.txt").read_text()
