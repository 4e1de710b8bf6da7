"""The live page: what is in the run folder now, for this machine only, and nothing else."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dare.core.errors import DareError
from dare.report.reference import find_reference
from dare.report.run_data import load_run
from dare.report.watch import HOST, make_server, version
from tests.unit.report_runs import evaluation, write_run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    server = make_server(tmp_path / "run", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield tmp_path / "run", server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str = "/", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_follows_the_run(served: tuple[Path, int]) -> None:
    run, port = served
    assert "no run here yet" in get(port)[1]
    write_run(run, num_steps=6, status="running")
    before = get(port, "/version")[1]
    status, page = get(port)
    assert status == 200
    assert "still running: step 6 of 6" in page
    assert 'fetch("version"' in page
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    assert get(port, "/version")[1] != before
    assert "still running: step 7" in get(port)[1]


def test_only_this_machine_and_only_the_page(served: tuple[Path, int]) -> None:
    run, port = served
    write_run(run, num_steps=3)
    assert get(port, host=f"localhost:{port}")[0] == 200
    assert get(port, host="evil.example:80")[0] == 403
    for path in ("/recipe.yaml", "/../run/recipe.yaml", "//etc/passwd", "/version/x"):
        assert get(port, path)[0] == 404


def test_a_taken_port_is_said(served: tuple[Path, int]) -> None:
    with pytest.raises(DareError, match="cannot serve"):
        make_server(served[0], served[1])


def test_version_is_empty_without_a_run(tmp_path: Path) -> None:
    assert version(tmp_path) == ""


def test_references_are_shown_or_refused(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", 6))
    assert find_reference(run) is None
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"label": "seed 0", "evaluations": [evaluation(0, 3), evaluation(6, 90)]}))
    found = find_reference(run, path)
    assert found is not None
    assert found.label == "seed 0"
    path.write_text('{"label": 1}')
    with pytest.raises(DareError, match="not a reference"):
        find_reference(run, path)


def test_a_shipped_reference_counts_only_for_equal_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(write_run(tmp_path / "run", 6))
    folder = tmp_path / "benchmarks" / "results" / "reference"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = {key: run.recipe.get(key) for key in ("algorithm", "task", "decode")}
    record = {"label": "shipped", **settings, "evaluations": [evaluation(6, 90)]}
    (folder / f"{run.name}.json").write_text(json.dumps(record))
    assert find_reference(run) is not None
    (folder / f"{run.name}.json").write_text(json.dumps({**record, "task": {"name": "other"}}))
    assert find_reference(run) is None
