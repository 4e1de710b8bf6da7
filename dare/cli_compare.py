"""The verb `dare compare`; its body imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="a study, YAML", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option(help="folder; default: runs/studies/NAME of the study")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes at a time; default: one per CPU")] = None,
    is_check: Annotated[bool, typer.Option("--check", help="check the study and list its runs, run nothing")] = False,
    is_report: Annotated[
        bool, typer.Option("--report", help="report on what has been run, run nothing; also while it runs elsewhere")
    ] = False,
) -> None:
    """Compare algorithms under one budget: same start, prompts, decoding and evaluation, several seeds.

    Runs what is missing and writes OUT/report: one HTML page, summary.csv, runs.csv, results.json and the curves. The
    same command resumes; what is done is not run again. Settings that differ without being declared are refused.

    \b
    Examples:
      dare compare recipes/studies/smoke.yaml --check
      dare compare recipes/studies/smoke.yaml --out runs/smoke --workers 2
      dare compare recipes/studies/smoke.yaml --out runs/smoke --report
    """
    from dare.studies.study import load_study

    plan = load_study(study)
    if is_check:
        for cell in plan.cells:
            typer.echo(cell.name)
        for (panel, name), reason in plan.impossible.items():
            typer.secho(f"{panel.name}/{name} is not run: {reason}", fg="yellow")
        return
    import os

    from dare.studies.build import build_study_report
    from dare.studies.run import recorded_cells, run_study

    folder = out or Path("runs") / "studies" / plan.study.name
    if is_report:
        typer.echo(build_study_report(plan, recorded_cells(plan, folder), folder) / "index.html")
        return
    try:
        cells = run_study(plan, folder, workers or os.cpu_count() or 1, typer.echo)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command continues") from error
    typer.echo(build_study_report(plan, cells, folder) / "index.html")
