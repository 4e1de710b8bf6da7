"""Studies: unlike settings are refused by name, budgets become steps, results become tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from typer.testing import CliRunner

from dare.algorithms.cj_grpo import CJGRPO
from dare.cli import app
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.studies.build import build_study_report
from dare.studies.results import Missing, Result, read_cell, step_cost
from dare.studies.run import Job, cell_folder, check_settings, is_finished, recorded_cells, resolve_cells
from dare.studies.study import START, Cell, Panel, Plan, load_study
from dare.studies.summary import overall, summarize
from tests.unit.report_runs import evaluation, write_lines
from tests.unit.test_report import Page

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
STUDY: dict[str, Any] = {
    "name": "small",
    "budget": {"completions": 640},
    "seeds": [0, 1, 2],
    "recipe": {
        "decode": {"gen_length": 8, "block_length": 8, "steps_per_block": 2, "unmask": "max_prob", "temperature": 1.0},
        "train": {"prompts_per_step": 8, "completions_per_prompt": 8},
        "evaluation": {"num": 40},
    },
    "tasks": {"sum": {"recipe": {"task": {"name": "chain_sum"}}}},
    "families": {"llada": {"start": str(ROOT / "recipes" / "tiny" / "llada_sft.yaml")}},
    "algorithms": {"cj_grpo": None, "espo": {"recipe": {"optimizer": {"lr": 3.0e-4}}}},
    "tuned": ["optimizer.lr"],
}


def write_study(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def plan_of(tmp_path: Path, **changes: Any) -> Plan:
    return load_study(write_study(tmp_path, **changes))


def resolved(plan: Plan, cost: float = 64.0) -> list[Cell]:
    costs = {(cell.panel, cell.algorithm): cost for cell in plan.cells}
    return resolve_cells(plan, dict.fromkeys(plan.panels, "start-folder"), costs)


def write_result(
    out: Path, cell: Cell, num_solved: int, *, status: str = "finished", reward: float | None = None
) -> None:
    folder = cell_folder(out, cell)
    folder.mkdir(parents=True)
    steps = cell.recipe.train.steps
    (folder / "recipe.yaml").write_text(cell.recipe.dump_yaml())
    (folder / "run.json").write_text(json.dumps({"status": status, "versions": {"torch": "2"}}))
    row = {"nfe": 2.0, "completion_length": 6.0, "view_forwards": 100.0, "solve_rate": 0.2, "reward": 0.3}
    write_lines(folder / "metrics.jsonl", [{"step": step, **row} for step in range(1, steps + 1)])
    write_lines(
        folder / "timing.jsonl",
        [{"step": step, "seconds": 0.5, "peak_memory_mb": 100.0 + step} for step in range(1, steps + 1)],
    )
    last = evaluation(steps, num_solved)
    write_lines(folder / "eval.jsonl", [evaluation(0, 20), {**last, "reward_mean": reward or last["reward_mean"]}])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_sound(path: Path) -> None:
    plan = load_study(path)
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    assert all(cell.recipe.model.path == START for cell in plan.cells)
    result = CliRunner().invoke(app, ["compare", str(path), "--check"])
    assert result.exit_code == 0
    assert plan.cells[0].name in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned": []}, r"unlike settings[\s\S]*optimizer.lr: 0.0001 for cj_grpo, 0.0003 for espo"),
        (
            {"algorithms": {"cj_grpo": None, "espo": {"recipe": {"decode": {"steps_per_block": 8}}}}},
            r"unlike settings[\s\S]*decode.steps_per_block: 2 for cj_grpo, 8 for espo",
        ),
        (
            {"algorithms": {"cj_grpo": None, "espo": {"recipe": {"evaluation": {"num": 50}}}}},
            r"evaluation.num: 40 for cj_grpo, 50 for espo",
        ),
        ({"algorithms": {"cj_grpo": {"recipe": {"task": {"name": "countdown"}}}, "espo": None}}, "unlike settings"),
        ({"algorithms": {"cj_grpo": {"recipe": {"model": {"dtype": "bfloat16"}}}, "espo": None}}, "model.dtype"),
        ({"tuned": ["decode.temperature"]}, "cannot be tuned"),
        ({"budget": {"completions": 10, "seconds": 3}}, "exactly one"),
        ({"budget": {}}, "exactly one"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": []}, "seeds"),
        ({"algorithms": {"cjgrpo": None}}, "did you mean 'cj_grpo'"),
        ({"algorithms": {"sft": None}}, "learn from rewards"),
        ({"algorithms": {"espo": {"algorithm": {"name": "espo", "num_mcs": 2}}}}, "num_mc"),
        ({"algorithms": {"../espo": {"algorithm": {"name": "espo"}}}}, "names a folder"),
        ({"baseline": "wd1"}, "none of the algorithms"),
        ({"recipe": {"seed": 3}}, "seed"),
        ({"algoritms": {}}, "did you mean 'algorithms'"),
        ({"families": {"llada": {"start": "nowhere.yaml"}}}, "recipe not found"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DareError) as caught:
        plan_of(tmp_path, **change)
    assert re.search(message, str(caught.value))


def test_files_that_are_no_studies(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="study not found"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(DareError, match="mapping"):
        load_study(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    with pytest.raises(DareError, match="not valid YAML"):
        load_study(tmp_path / "bad.yaml")


class MaskedOnly(CJGRPO):
    """An algorithm that block models cannot be trained with."""

    forbidden: ClassVar[dict[str, str]] = {"block_causal": "it looks ahead"}


def test_pairs_that_cannot_work_are_left_out_with_the_reason(tmp_path: Path) -> None:
    families: dict[str, Any] = {n: {"start": str(ROOT / f"recipes/tiny/{n}_sft.yaml")} for n in ("llada", "sdar")}
    families["sdar"]["recipe"] = {"decode": {"block_length": 4}}
    masked_only = {"algorithm": {"name": f"{__name__}:MaskedOnly"}}
    plan = plan_of(tmp_path, families=families, algorithms={"cj_grpo": None, "masked": masked_only})
    assert [(panel.family, name) for panel, name in plan.impossible] == [("sdar", "masked")]
    assert {cell.name for cell in plan.cells if cell.algorithm == "masked"} == {
        f"llada/sum/masked/seed-{seed}" for seed in range(3)
    }
    assert "it looks ahead" in (build_study_report(plan, resolved(plan), tmp_path) / "index.html").read_text()


def test_cells_differ_in_nothing_else(tmp_path: Path) -> None:
    cells = resolved(plan_of(tmp_path))
    assert len(cells) == 6
    for cell in cells:
        assert cell.recipe.train.steps == 10
        assert cell.recipe.evaluation.every == 3
        assert cell.recipe.model.path == "start-folder"
        assert (cell.recipe.seed, cell.recipe.algorithm.name) == (cell.seed, cell.algorithm)
    plain = {
        cell.recipe.model_copy(update=dict.fromkeys(("name", "seed", "algorithm", "optimizer"))).dump_yaml()
        for cell in cells
    }
    assert len(plain) == 1


def test_a_budget_too_small_is_said(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="does not pay for one step"):
        resolved(plan_of(tmp_path), cost=641.0)


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    (cell, *_) = resolved(plan_of(tmp_path))
    write_result(tmp_path, cell, 50)
    job = Job(cell.name, cell.recipe, cell_folder(tmp_path, cell))
    check_settings(job, tmp_path)
    assert is_finished(job)
    longer = cell.recipe.model_copy(update={"train": cell.recipe.train.model_copy(update={"steps": 11})})
    with pytest.raises(DareError) as caught:
        check_settings(Job(cell.name, longer, job.out), tmp_path)
    assert "train.steps: 10 there, 11 in the study" in str(caught.value)


def test_a_report_while_the_study_runs(tmp_path: Path) -> None:
    """Finished, half-written, damaged and not begun: what can be shown is shown, and nothing is run."""
    study, out = write_study(tmp_path), tmp_path / "out"
    plan = load_study(study)
    cells = resolved(plan)
    for cell in cells[:4]:
        write_result(out, cell, 80, status="running" if cell is cells[2] else "finished")
        asked = Job(cell.name, cell.recipe, cell_folder(out, cell)).file(out, ".yaml")
        asked.parent.mkdir(exist_ok=True)
        asked.write_text(cell.recipe.dump_yaml())
    with (cell_folder(out, cells[2]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    for name in ("recipe.yaml", "eval.jsonl"):
        (cell_folder(out, cells[3]) / name).write_text("{[\n")
    assert recorded_cells(plan, out)[:4] == cells[:4]
    assert recorded_cells(plan, out)[4:] == plan.cells[4:]
    result = CliRunner().invoke(app, ["compare", str(study), "--out", str(out), "--report"])
    assert result.exit_code == 0, result.output
    text = Page((out / "report" / "index.html").read_text()).text
    assert "2 of 6 runs" in text
    assert "cj_grpo, seed 2: running at step 10 of 10" in text
    assert "espo, seed 0: 1 line of eval.jsonl cannot be read" in text
    with pytest.raises(DareError, match="other settings"):
        recorded_cells(plan_of(tmp_path, recipe={**STUDY["recipe"], "evaluation": {"num": 39}}), out)
    with pytest.raises(DareError, match="no study here"):
        recorded_cells(plan, tmp_path / "elsewhere")


def test_costs_and_curves_are_those_of_the_logs(tmp_path: Path) -> None:
    (cell, *_) = resolved(plan_of(tmp_path))
    write_result(tmp_path, cell, 50)
    folder = cell_folder(tmp_path, cell)
    result = read_cell(cell, folder, "forwards")
    assert isinstance(result, Result)
    assert (result.costs.completions, result.costs.forwards) == (640.0, 10 * (2 * 64 + 100))
    assert (result.costs.tokens, result.costs.seconds, result.costs.memory_mb) == (3840.0, 5.0, 110.0)
    assert [(point.step, point.spent) for point in result.curve] == [(0, 0.0), (10, 2280.0)]
    assert step_cost(folder, cell.recipe, "forwards") == 228.0
    assert step_cost(folder, cell.recipe, "seconds") == 0.5


def test_report_of_a_study(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, baseline="espo")
    cells = resolved(plan)
    for cell in cells:
        write_result(tmp_path, cell, {"cj_grpo": 90, "espo": 60}[cell.algorithm] + 5 * cell.seed)
    report = build_study_report(plan, cells, tmp_path)
    assert sorted(path.name for path in report.iterdir()) == [
        "curves.png", "curves.svg", "index.html", "results.json", "runs.csv", "summary.csv",
    ]  # fmt: skip
    first, second = csv.DictReader(io.StringIO((report / "summary.csv").read_text()))
    assert (first["algorithm"], first["rank"], second["algorithm"]) == ("cj_grpo", "1.0", "espo")
    assert float(first["solve_rate"]) == pytest.approx(95 / 200)
    assert (float(first["solve_rate_low"]), float(first["solve_rate_high"])) == pytest.approx((90 / 200, 100 / 200))
    assert float(first["gain_over_baseline"]) == pytest.approx(30 / 200)
    assert float(first["gain_over_baseline_low"]) == pytest.approx(30 / 200)  # every seed gains the same: pairing shows
    assert float(first["p_sign_flip"]) == 0.25
    assert float(first["p_holm"]) == float(first["p_raw"]) < 1e-9
    assert second["gain_over_baseline"] == ""
    assert len(list(csv.DictReader(io.StringIO((report / "runs.csv").read_text())))) == 6
    data = json.loads((report / "results.json").read_text())
    assert [run["recipe"]["seed"] for run in data["runs"]] == [0, 1, 2, 0, 1, 2]
    assert all(Recipe.model_validate(run["recipe"]) for run in data["runs"])
    assert data["origin"]["hardware"]["num_cpus"] >= 1
    page = Page((report / "index.html").read_text())
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "6 of 6 runs" in page.text
    assert "<span>25</span><span>50%</span>" in (report / "index.html").read_text()  # an axis just above the intervals
    assert "cj_grpo solves most, 47.5%" in page.text
    assert "cj_grpo solves more than espo: +15.0 points" in page.text


def test_missing_runs_are_listed_and_the_rest_is_shown(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    cells = resolved(plan)
    for cell in cells[:2]:
        write_result(tmp_path, cell, 80)
    write_result(tmp_path, cells[2], 10, status="running")
    results = [read_cell(cell, cell_folder(tmp_path, cell), "completions") for cell in cells]
    assert [item.reason for item in results if isinstance(item, Missing)] == [
        "running at step 10 of 10",
        *["not run yet"] * 3,
    ]
    text = Page((build_study_report(plan, cells, tmp_path) / "index.html").read_text()).text
    assert "2 of 6 runs" in text
    assert "4 of 6 runs are missing" in text
    assert "cj_grpo, seed 2: running at step 10 of 10" in text
    assert "espo, seeds 0, 1 and 2: not run yet" in text


def test_a_study_without_any_run_still_has_a_page(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert "No run has finished" in (build_study_report(plan, resolved(plan), tmp_path) / "index.html").read_text()


def test_reward_that_hides_failure_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    cells = resolved(plan)
    for cell in cells:
        is_hacked = cell.algorithm == "espo"
        write_result(tmp_path, cell, 10 if is_hacked else 60, reward=0.9 if is_hacked else None)
    text = (build_study_report(plan, cells, tmp_path) / "index.html").read_text()
    assert "The reward rose while the solve rate did not: espo." in text
    assert "Below the start checkpoint, interval and all: espo." in text


def test_ranks_over_panels(tmp_path: Path) -> None:
    tasks = {name: {"recipe": {"task": {"name": name}}} for name in ("chain_sum", "countdown")}
    plan = plan_of(tmp_path, tasks=tasks)
    cells = resolved(plan)
    for cell in cells:
        write_result(tmp_path, cell, 60 if (cell.algorithm == "espo") == (cell.panel.task == "countdown") else 40)
    results = [read_cell(cell, cell_folder(tmp_path, cell), "completions") for cell in cells]
    tables = summarize(plan, results)
    assert [table.panel for table in tables] == [Panel("llada", "chain_sum"), Panel("llada", "countdown")]
    assert {name: places for name, places, _ in overall(tables)} == {"cj_grpo": [1.0, 2.0], "espo": [2.0, 1.0]}
    page = (build_study_report(plan, cells, tmp_path) / "index.html").read_text()
    assert page.count('<b>30.0%</b><span class="rank">1</span>') == 2
    assert page.count('20.0%<span class="rank">2</span>') == 2
