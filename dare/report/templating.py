"""How every page of DARE is rendered: autoescaped, and an unknown name is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from dare.terminal.text import number, percent, visible


def environment() -> Environment:
    """Templates of `dare/report/templates` with the filters that they share."""
    found = Environment(
        loader=PackageLoader("dare.report"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    found.filters.update(percent=percent, number=number, points=points, visible=visible, lines=lines)
    return found


def lines(text: str) -> str:
    """What a model or a data set wrote, in its own lines; everything else invisible is shown."""
    return visible(text, keep="\n")


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
