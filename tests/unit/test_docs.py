"""Documentation that shows code is run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from dare.core.registry import TABLES

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_python_api_page_runs(family: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python_api.md").read_text()
    names = {"PATH": str(tiny_checkpoints[family]), "SCRATCH": str(tmp_path)}
    page = doctest.DocTestParser().get_doctest(text, names, "python_api.md", "python_api.md", 0)
    assert len(page.examples) > 15
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(page)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?!\S*NAME)(?:dare|tests|recipes|docs|benchmarks)/[\w/.-]+\.(?:py|yaml|md))`", text):
        assert (ROOT / target).exists(), target


def test_every_algorithm_has_a_row() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    assert all(f"| `{name}` |" in page for name in TABLES["algorithms"])
