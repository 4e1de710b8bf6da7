"""Makes a site of docs/ and of what lies beside it: README, results, notebooks, and pages read off the code.

mkdocs calls the functions whose names begin with `on_`. Markdown has the links of the repository, where it is read as
well; here they become links of the site.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
_PAPER = re.compile(r"\[(\d{4}\.\d{5})\](?!\()")


def on_config(config: Any) -> Any:
    """Pages of docs/ that no section of the navigation names get one of their own."""
    named = set(_leaves(config.nav))
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    results = [place for place in _places().values() if place.startswith("results/") and place.endswith(".md")]
    config.nav = [*config.nav, {"Results": results}, *([{"More": others}] if others else [])]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for source, place in _places().items():
        path = ROOT / source
        if path.suffix == ".md":
            files.append(File.generated(config, place, content=_site_markdown(path.read_text(), source, place)))
        elif path.suffix == ".ipynb":
            files.append(File.generated(config, place, content=_site_markdown(notebook_page(path), source, place)))
        elif path.suffix == ".svg":
            files.append(File.generated(config, place, abs_src_path=str(path)))
    algorithms = (ROOT / "docs" / "algorithms.md").read_text()
    pages = {
        "cli": reference.cli_page(),
        "recipe": reference.recipe_page(),
        "recipes": reference.recipes_page(),
        "papers": with_papers(reference.papers_page(algorithms)),
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "results/index.md", content=_results_index()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/ that leave docs/, and papers by their number."""
    if page.file.generated_by is not None:
        return markdown
    return _site_markdown(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def with_papers(text: str) -> str:
    """[2502.09992] becomes a link."""
    return _PAPER.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    cells = []
    for cell in json.loads(path.read_text())["cells"]:
        body = "".join(cell["source"])
        cells.append(body if cell["cell_type"] == "markdown" else f"```python\n{body}\n```")
    return "\n\n".join([*cells, f"*This page is the notebook `notebooks/{path.name}`, which the tests run.*"]) + "\n"


def relinked(text: str, source: str, place: str) -> str:
    """Relative links of the Markdown file `source` as they are from the page `place`.

    Files that are no part of the site are named instead of linked; a link to nothing stays, and the strict build fails.
    """
    places = _places()

    def one(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        found = os.path.normpath(PurePosixPath(source).parent / target)
        if found not in places and not found.startswith("docs/"):
            return f"{words[1:-1]} (`{found}`)" if (ROOT / found).exists() else match[0]
        goal = places.get(found, found.removeprefix("docs/"))
        return f"{words}({os.path.relpath(goal, PurePosixPath(place).parent)}{anchor})"

    return _LINK.sub(one, text)


def _site_markdown(text: str, source: str, place: str) -> str:
    return with_papers(relinked(text, source, place))


def _places() -> dict[str, str]:
    """Paths of the repository outside docs/ that the site shows, with their places there."""
    places = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    places |= {"recipes/tiny": "reference/recipes.md", "benchmarks/results": "results/index.md"}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*")):
        if path.suffix in (".md", ".svg"):
            places[f"benchmarks/results/{path.name}"] = f"results/{path.name}"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        places[f"notebooks/{path.name}"] = f"notebooks/{path.stem}.md"
    return places


def _results_index() -> str:
    names = [path.name for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
    others = [path.name for path in sorted((ROOT / "benchmarks" / "results").glob("*")) if path.name not in names]
    lines = ["# Results", "", "Measured figures, each with its machine and command.", ""]
    lines += [f"* [{name.removesuffix('.md').replace('_', ' ')}]({name})" for name in names]
    return "\n".join([*lines, "", f"More in `benchmarks/results`: {', '.join(others)}."]) + "\n"


def _leaves(nav: Any) -> Iterator[str]:
    for item in nav.values() if isinstance(nav, dict) else nav:
        if isinstance(item, str):
            yield item
        else:
            yield from _leaves(item)
