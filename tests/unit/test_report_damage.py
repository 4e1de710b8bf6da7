"""A run folder with any value replaced still gives a page: a newer version or a fault never stops a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dare.report.build import live_page
from tests.unit.report_runs import write_run

FILES = ("metrics.jsonl", "timing.jsonl", "eval.jsonl", "samples.jsonl", "run.json", "recipe.yaml")
ODD: list[Any] = [None, "x", [], {}, -1, 10**12, [1, 2], {"a": 1}, True, float("nan"), [None], "</script>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("damage") / "run", num_steps=6)


def replaced(value: Any, path: list[int], odd: Any) -> Any:
    """`value` with the element that `path` leads to (choices modulo the number of keys) replaced."""
    if not isinstance(value, dict | list) or not value or not path:
        return odd
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(value[key], path[1:], odd)
    return copy


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    line=st.integers(0, 20),
    path=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    odd=st.sampled_from(ODD),
)
def test_any_value_may_be_odd(run: Path, name: str, line: int, path: list[int], odd: Any) -> None:
    file = run / name
    before = file.read_text()
    try:
        if name == "recipe.yaml":
            file.write_text(yaml.safe_dump(replaced(yaml.safe_load(before), path, odd)))
        elif name == "run.json":
            file.write_text(json.dumps(replaced(json.loads(before), path, odd)))
        else:
            records = [json.loads(text) for text in before.split("\n") if text]
            records[line % len(records)] = replaced(records[line % len(records)], path, odd)
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
        page = live_page(run)
    finally:
        file.write_text(before)
    assert "</html>" in page
    assert page.count("<script>") == 1  # that of the live page
