"""Documentation that shows code is run."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import yaml

from dare.core.checks import check
from dare.core.recipe import parse_recipe
from dare.core.registry import TABLES
from dare.terminal.schema import plugin_keys, recipe_keys

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


def test_recipes_of_the_migration_page_are_recipes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "migrating.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert check(parse_recipe(yaml.safe_load(block), where="migrating.md")) == []  # no warning either


def test_keys_that_the_migration_page_names_exist() -> None:
    """Dotted names in its right-hand columns are keys of a recipe or options of an algorithm or a task."""
    page = (ROOT / "docs" / "migrating.md").read_text()
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("|")]
    named = {name for cell in cells for name in re.findall(r"`(\w+\.\w+)(?:: [^`]*)?`", cell)}
    known = {key.name for key in recipe_keys()}
    known |= {
        key.name for table in ("algorithms", "tasks") for name in TABLES[table] for key in plugin_keys(table, name)
    }
    files = {name for name in named if name.endswith((".jsonl", ".yaml"))}
    assert len(named) > 25
    assert named - files <= known


def test_tests_that_the_numerics_page_names_exist() -> None:
    """`test_file.py::test_name`, and further names of the same file after it."""
    page = (ROOT / "docs" / "numerics.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    contracts = {path.name: path.read_text() for path in (ROOT / "tests" / "contracts").glob("test_*.py")}
    found = re.findall(r"`(tests/contracts/)?(test_\w+\.py)::(test_\w+)`((?:, `test_\w+`)*)", page)
    assert len(found) > 15
    for folder, name, first, more in found:
        text = contracts[name] if folder else (ROOT / "tests" / "numerics" / name).read_text()
        for test in [first, *re.findall(r"`(test_\w+)`", more)]:
            assert f"def {test}(" in text, test
    for name in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)", page):
        assert name in files, name


def test_every_algorithm_has_a_row() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    assert all(f"| `{name}` |" in page for name in TABLES["algorithms"])


def test_every_family_has_a_row() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    assert all(f"| `{name}` |" in page for name in TABLES["families"])


def test_every_line_of_the_determinism_page_has_its_test() -> None:
    page = (ROOT / "docs" / "determinism.md").read_text()
    promised = page.split("## Not reproducible")[0]
    lines = [line for line in promised.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.startswith(("|---", "| what "))]
    assert len(rows) > 20
    for row in rows:
        match = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert match is not None, row
        assert f"def {match[2]}(" in (ROOT / match[1]).read_text(), row
