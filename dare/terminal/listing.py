"""The tables of plug-ins and the shipped recipes, as text."""

from __future__ import annotations

from pathlib import Path

from dare.core.errors import unknown_name
from dare.core.registry import ALGORITHMS, TABLES, resolve

_MODELS = {"full": "masked", "block_causal": "block"}  # attention kind -> what the models are called


def listing(table: str | None) -> str:
    """One table, or all of them. Raises DareError for an unknown table."""
    names = [*TABLES, "recipes"]
    if table is None:
        return "\n\n".join(f"{name}\n{_indent(_rows(name))}" for name in names)
    if table not in names:
        raise unknown_name("table", table, names)
    return _rows(table)


def recipe_files() -> list[Path]:
    """The recipes of the working directory, or else those of the source tree that this package runs from."""
    for root in (Path("recipes"), Path(__file__).parents[2] / "recipes"):
        found = [path for path in sorted(root.rglob("*.yaml")) if not _is_other(path)]
        if found:
            return found
    return []


def _is_other(path: Path) -> bool:
    """Whether the file is a part of recipes or a study."""
    return path.parent.name.startswith("_") or path.parent.name == "studies"


def _rows(table: str) -> str:
    if table == "algorithms":
        return _algorithm_rows()
    if table == "recipes":
        rows = [(str(path), headline(path)) for path in recipe_files()]
    else:
        rows = [(name, row.summary) for name, row in TABLES[table].items()]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {summary}".rstrip() for name, summary in rows) or "(none)"


def _algorithm_rows() -> str:
    """Every algorithm with the kinds of models that it trains, and why not where it does not."""
    width = max(len(name) for name in ALGORITHMS)
    lines = [f"{'':<{width}}  {'  '.join(_MODELS.values())}"]
    for name, row in ALGORITHMS.items():
        forbidden = resolve("algorithms", name).forbidden
        marks = ("no" if kind in forbidden else "yes" for kind in _MODELS)
        cells = "  ".join(f"{mark:<{len(title)}}" for mark, title in zip(marks, _MODELS.values(), strict=True))
        lines.append(f"{name:<{width}}  {cells}  {row.summary}")
        lines += [f"{'':<{width}}    not on {_MODELS[kind]} models: {reason}" for kind, reason in forbidden.items()]
    return "\n".join(lines)


def headline(recipe: Path) -> str:
    """The comment that a recipe starts with."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
