"""A report of a run: one folder that can be sent to somebody."""

from __future__ import annotations

from pathlib import Path

from dare.core.errors import DareError
from dare.core.files import whole_directory, write_text
from dare.report.comparison import Comparison, compare
from dare.report.curves import charts
from dare.report.markdown import render_markdown
from dare.report.page import render
from dare.report.plots import save_plots
from dare.report.reference import find_reference
from dare.report.run_data import RunData, earlier_stage, load_run

_FILES = ("index.html", "report.md", "curves.png", "curves.svg")


def build_report(run_dir: Path, out: Path, baseline: Path | None = None, reference: Path | None = None) -> Path:
    """Write index.html (self-contained), report.md, curves.png and curves.svg to `out`, all or nothing; returns `out`.

    Works for a run that has not finished, and says what is missing. The baseline and the run that the model came
    from are shown as earlier stages. Raises DareError if a folder is no run, or if `out` holds anything else.
    """
    _require_report_folder(out)
    stages, comparison = _load(run_dir, baseline)
    run = stages[-1]
    found = find_reference(run, reference)
    with whole_directory(out) as temporary:
        write_text(temporary / "index.html", render(stages, comparison, found))
        write_text(temporary / "report.md", render_markdown(run, comparison))
        save_plots(charts(run, found.evaluations if found is not None else None), run.name, temporary)
    return out


def live_page(run_dir: Path, baseline: Path | None = None, reference: Path | None = None) -> str:
    """The same page as it is now, asking its server for changes. Errors as in `build_report`."""
    stages, comparison = _load(run_dir, baseline)
    return render(stages, comparison, find_reference(stages[-1], reference), is_live=True)


def _load(run_dir: Path, baseline: Path | None) -> tuple[list[RunData], Comparison]:
    """The run with its earlier stages before it, and what it is compared with."""
    run = load_run(run_dir)
    compared = load_run(baseline) if baseline is not None else None
    parent = earlier_stage(run)
    stages = [run]
    if parent is not None and (baseline is None or parent.resolve() != baseline.resolve()):
        stages.insert(0, load_run(parent))
    if compared is not None:
        stages.insert(0, compared)
    return stages, compare(run, compared)


def _require_report_folder(out: Path) -> None:
    """`out` is replaced as a whole, so it may hold an earlier report and nothing else."""
    if out.exists() and not out.is_dir():
        raise DareError("the report is a folder", where=str(out), got="a file", fix="choose another --out")
    others = sorted(path.name for path in out.iterdir() if path.name not in _FILES) if out.is_dir() else []
    if others:
        raise DareError(
            "the report would replace a folder that holds other files",
            where=str(out),
            got=", ".join(others[:3]),
            fix="choose another --out",
        )
