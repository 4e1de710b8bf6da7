"""How long rows are, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOURS = ("#0068a8", "#c04a00", "#3a7d44")


def save_lengths(lengths: Mapping[str, Sequence[int]], title: str, path: Path) -> None:
    """Write histograms of lengths in tokens, one under the other on one axis, to `path` (.png or .svg)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.9 * len(lengths) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False, fontsize=10)
    axes = figure.subplots(len(lengths), 1, sharex=True, squeeze=False)[:, 0]
    for place, (name, values) in enumerate(lengths.items()):
        axes[place].hist(values, bins=min(60, max(values) - min(values) + 1), color=_COLOURS[place % len(_COLOURS)])
        axes[place].axvline(sum(values) / len(values), color="black", linewidth=0.8, linestyle=":")
        axes[place].set_ylabel("rows")
        axes[place].set_title(f"{name}: mean {sum(values) / len(values):.0f}, longest {max(values)}", fontsize=9)
        axes[place].spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("tokens")
    figure.savefig(path, dpi=150)
