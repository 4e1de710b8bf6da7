"""The faults of `benchmarks/mutations.py` can still be put into the package; running them all takes too long here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fault_has_its_place_and_its_tests() -> None:
    found = load().MUTATIONS
    assert len(found) >= 42
    for mutation in found:
        source = (ROOT / "dare" / mutation.file).read_text(encoding="utf-8")
        assert source.count(mutation.right) == 1, mutation.fault
        assert mutation.wrong != mutation.right
        for test in mutation.tests:
            assert (ROOT / test).is_file(), test
