"""The curves as PNG and SVG, for papers and slides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dare.report.curves import ORDERED_TONES, Chart

_COLOURS = ("#0068a8", "#c04a00")
_ORDERED = ("#d19a00", "#5b9e2d", "#0f8a8a", "#3b5fc0", "#6a2c91")
_COLOUR_OF_TONE = {"a": _COLOURS[0], "b": _COLOURS[1], "c": "#007a5a", "quiet": "#c9d1d9"}
_COLOUR_OF_TONE |= dict(zip(ORDERED_TONES, _ORDERED, strict=True))


def save_plots(charts: list[Chart], title: str, directory: Path, num_columns: int = 3) -> None:
    """Write curves.png and curves.svg. The SVG holds no date and no random ids, so equal runs give equal files."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "dare", "svg.fonttype": "none", "font.size": 9, "axes.unicode_minus": True}):
        num_columns = min(num_columns, max(len(charts), 1))
        num_rows = max(math.ceil(len(charts) / num_columns), 1)
        figure = Figure(figsize=(4.0 * num_columns, 2.7 * num_rows), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, parse_math=False)  # a name is text, whatever dollar signs it holds
        for index, chart in enumerate(charts, start=1):
            _plot(figure.add_subplot(num_rows, num_columns, index), chart)
        if not charts:
            figure.text(0.5, 0.4, "no data yet", ha="center")
        figure.savefig(directory / "curves.png", dpi=150, metadata={"Software": None})
        figure.set_layout_engine("none")  # keep the layout instead of computing it again
        figure.savefig(directory / "curves.svg", metadata={"Date": None})


def _plot(axes: Any, chart: Chart) -> None:
    scale = 100.0 if chart.unit == "percent" else 1.0
    for index, series in enumerate(chart.series):
        colour = _COLOUR_OF_TONE.get(series.tone or "", _COLOURS[min(index, 1)])
        values = [scale * value for value in series.values]
        marker = "o" if series.is_points or len(values) == 1 else None
        axes.plot(series.steps, values, color=colour, marker=marker, markersize=4, linewidth=1.3, label=series.label)
        if series.low is not None and series.high is not None:
            low, high = [scale * value for value in series.low], [scale * value for value in series.high]
            axes.fill_between(series.steps, low, high, color=colour, alpha=0.17, linewidth=0)
    axes.set_title(f"{chart.title}, %" if chart.unit == "percent" else chart.title, loc="left", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel(chart.x_name)
    is_named = [series.tone != "quiet" for series in chart.series]
    if sum(is_named) > 1 or (all(is_named) and chart.series[0].low is not None):
        axes.legend(frameon=False, fontsize=8)
