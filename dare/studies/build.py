"""A study's report: one folder with the page, the tables and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dare.core.files import whole_directory, write_json, write_text
from dare.report.plots import save_plots
from dare.studies.origin import describe_origin
from dare.studies.page import render_study, study_charts
from dare.studies.results import read_cell
from dare.studies.run import cell_folder
from dare.studies.study import Cell, Plan
from dare.studies.summary import summarize
from dare.studies.tables import results_json, runs_csv, summary_csv

_MANY = 12  # charts, from which the picture gets more columns


def build_study_report(plan: Plan, cells: Sequence[Cell], out: Path) -> Path:
    """Write OUT/report: index.html, summary.csv, runs.csv, results.json, curves.png and curves.svg, all or nothing.

    Cells without a result are listed with the reason. Returns the folder.
    """
    unit = plan.study.budget.unit
    results = [read_cell(cell, cell_folder(out, cell), unit) for cell in cells]
    tables, origin = summarize(plan, results), describe_origin()
    with whole_directory(out / "report") as temporary:
        write_text(temporary / "index.html", render_study(plan, results, tables, origin))
        write_text(temporary / "summary.csv", summary_csv(tables))
        write_text(temporary / "runs.csv", runs_csv(results))
        write_json(temporary / "results.json", results_json(plan, results, tables, origin))
        charts = [
            replace(chart, title=f"{table.panel.name}: {chart.title}")
            for table in tables
            for chart in study_charts(table, unit)
        ]
        save_plots(charts, plan.study.name, temporary, num_columns=5 if len(charts) > _MANY else 3)
    return out / "report"
