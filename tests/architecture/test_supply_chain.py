"""What is loaded is data, what is required has a licence that allows it, what is built is the same every time."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import build_dist  # noqa: E402
import licences  # noqa: E402

FILES = sorted(path for folder in ("dare", "benchmarks", "tests", "tools") for path in (ROOT / folder).rglob("*.py"))
# Each of them runs what a file says; the constructor of YAML data is called in one place, which bounds it.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFE = {"dare/harness/lm_run.py": ["yaml.load"]}  # with a safe loader of its own, to which tags mean nothing
YAML_HOME = ROOT / "dare" / "core" / "yaml_text.py"


def _loads(path: Path) -> list[str]:
    """The calls and imports of a file that unpickle, or would unless told not to."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        imported = [module, *names] if module else names
        found += [name for name in imported if name.partition(".")[0] in UNPICKLERS]
        found += [f"{module}.{name}" for name in names if (module, name) in {("torch", "load"), ("yaml", "load")}]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        is_weights_only = isinstance(only := options.get("weights_only"), ast.Constant) and only.value is True
        if (owner, node.func.attr) == ("torch", "load") and not is_weights_only:
            found.append("torch.load without weights_only")
        if owner == "yaml" and node.func.attr in {"load", "load_all", "unsafe_load", "full_load"}:
            found.append(f"yaml.{node.func.attr}")
        if "allow_pickle" in options:
            found.append("allow_pickle")
    return found


def test_nothing_is_unpickled() -> None:
    found = {str(path.relative_to(ROOT)): loads for path in FILES if (loads := _loads(path))}
    assert found == SAFE


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    bad = ["import pickle", "from torch import load", "import torch\ntorch.load('x')", "import yaml\nyaml.load('a')"]
    bad += ["import torch\ntorch.load('x', weights_only=False)", "import numpy\nnumpy.load('x', allow_pickle=True)"]
    for index, text in enumerate(bad):
        path = tmp_path / f"{index}.py"
        path.write_text(text)
        assert _loads(path), text
    (tmp_path / "good.py").write_text("import torch\ntorch.load('x', weights_only=True)")
    assert not _loads(tmp_path / "good.py")


def test_yaml_of_others_is_read_with_limits() -> None:
    callers = [path for path in sorted((ROOT / "dare").rglob("*.py")) if "yaml.safe_load(" in path.read_text()]
    assert callers == [YAML_HOME]


def test_licences_are_allowed() -> None:
    found = licences.required({"dev", "tensorboard"})
    assert {"torch", "transformers", "pytest", "reasoning-gym"} <= set(found)
    assert not licences.refused({"dev", "tensorboard"})


@pytest.mark.parametrize(
    ("stated", "is_allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-3.0-only OR BSD-3-Clause", True),
        ("MIT AND GPL-3.0-only", False),
        ("GNU General Public License v3 (GPLv3)", False),
        ("", False),
    ],
)
def test_a_licence_expression_is_read(stated: str, is_allowed: bool) -> None:
    assert licences.is_allowed("some-package", stated) is is_allowed


@pytest.mark.slow
def test_builds_are_the_same_bytes(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files belong to it")
    first = build_dist.build(ROOT, tmp_path / "first", epoch=1_700_000_000)
    before = os.umask(0o077)
    try:
        second = build_dist.build(ROOT, tmp_path / "second", epoch=1_700_000_000)
    finally:
        os.umask(before)
    assert [path.suffix for path in first] == [".whl", ".gz"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
