"""Whole or absent: a failure in the middle of a write leaves what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

from dare.core.errors import DareError
from dare.core.files import JsonLines, read_json, read_lines, whole_directory, write_json


def test_a_failed_write_keeps_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with whole_directory(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), whole_directory(target) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError("disk full")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_finished_write_replaces_the_directory_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for name in ("first", "second"):
        with whole_directory(target) as temporary:
            (temporary / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["second"]


def test_logs_are_cut_back_to_a_recorded_length(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    size = log.size()
    log.write({"step": 2})
    log.truncate(size)
    log.write({"step": 2, "again": True})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "again": True}]


def test_a_log_shorter_than_recorded_is_an_error(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    with pytest.raises(DareError, match="shorter"):
        log.truncate(1000)
    log.close()


def test_a_line_still_being_written_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "good.json", {"a": 1})
    assert read_json(tmp_path / "good.json", "state") == {"a": 1}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DareError, match="bad.json"):
        read_json(tmp_path / "bad.json", "state")
    with pytest.raises(DareError, match="not found"):
        read_json(tmp_path / "none.json", "state")
