"""The documentation as a site: it builds without warnings and without network, and says what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dare.cli import app
from dare.core.registry import ALGORITHMS, TABLES
from dare.terminal.listing import recipe_files
from dare.terminal.schema import plugin_keys, recipe_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a link, an anchor or a page of the navigation that leads nowhere is an error."""
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    path = list(sys.path)
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    sys.path[:] = path
    return folder


def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(sources) > 20
    assert all(list(site.rglob(f"{source.stem}.html")) for source in sources)
    pages = set(site.rglob("*.html")) - {site / "404.html"}
    links = {(page.parent / target).resolve() for page in pages for target in _targets(page)}
    assert {page.resolve() for page in pages} <= links


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="?(https?:)?//', text)
        assert not [*fetched, *re.findall(r"url\(['\"]?https?:", text)], path.name


def test_reference_pages_hold_every_command_key_recipe_and_algorithm(site: Path) -> None:
    commands = (site / "reference" / "cli.html").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) > 10
    assert all(f'id="dare-{name.removesuffix("_tables")}' in commands for name in names)
    keys = (site / "reference" / "recipe.html").read_text()
    options = [
        key for table in ("algorithms", "tasks", "executors") for n in TABLES[table] for key in plugin_keys(table, n)
    ]
    assert all(f"<code>{key.name}</code>" in keys for key in [*recipe_keys(), *options])
    assert "<code>int | null</code>" in keys
    recipes = (site / "reference" / "recipes.html").read_text()
    assert all(f'id="{path.stem}"' in recipes for path in recipe_files())
    papers = (site / "reference" / "papers.html").read_text()
    assert all(f"<code>{name}</code>" in papers for name in ALGORITHMS)
    assert "https://arxiv.org/abs/2509.06949" in papers


def test_links_out_of_docs_become_links_of_the_site(site: Path) -> None:
    assert 'href="results/mutations.html"' in (site / "numerics.html").read_text()
    assert 'href="algorithms.html"' in (site / "index.html").read_text()
    assert "numerics.html" in (site / "notebooks" / "your_own_algorithm.html").read_text()


def _targets(page: Path) -> list[str]:
    """Where the links of a page lead, but for those to the page itself."""
    found = re.findall(r'href="([^"#:]+)', page.read_text(encoding="utf-8"))
    return [target for target in found if target not in (".", page.name)]
