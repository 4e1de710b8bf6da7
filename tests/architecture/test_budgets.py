"""The house rules that a linter does not know: file and function budgets, banned calls, no names outside folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dare.core.registry import ALGORITHMS, FAMILIES

ROOT = Path(__file__).parents[2] / "dare"
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_CALLS = {"eval", "exec"}
JAIL = ROOT / "sandbox" / "jail"  # runs foreign code, in processes of its own


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_runs_or_unpickles_foreign_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and path.parent != JAIL:
                assert node.func.id not in BANNED_CALLS, f"line {node.lineno}"
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg == "trust_remote_code" and is_true), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_branch_on_the_name_of_a_plugin(path: Path) -> None:
    """`if name == "espo"` belongs in the plug-in's own folder, where nobody needs it."""
    names = {*ALGORITHMS, *FAMILIES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            constants = [side.value for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
            assert not names & {value for value in constants if isinstance(value, str)}, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_public_functions_say_what_comes_out(path: Path) -> None:
    """No underscore, at module level, longer than a few lines: a docstring."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert ast.get_docstring(node) or length <= 6, f"{node.name} has no docstring"
