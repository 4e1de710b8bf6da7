"""Traces on the screen: whole files only, pages that obey nothing in them, and clear words for what is missing."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dare.cli import app
from dare.core.errors import DareError
from dare.report.trace_page import MAX_ROWS, write_trace_page
from dare.report.trace_rows import read_row, rule, verdict
from dare.report.trace_terminal import TraceView
from dare.rollout.trace_file import TraceFile, load_trace
from tests.unit.test_report import Page
from tests.unit.trace_files import NASTY, write_trace

TEMPLATES = Path(__file__).parents[2] / "dare" / "report" / "templates"


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("traces") / "a.safetensors", block_length=4)


def changed(
    path: Path, target: Path, *, drop: tuple[str, ...] = (), info: dict[str, object] | None = None, **arrays: object
) -> Path:
    """A copy of a trace file with tensors dropped or replaced and metadata changed."""
    file = load_trace(path)
    kept = {name: array for name, array in load_file(path).items() if name not in drop}
    metadata = json.dumps({**file.info, **(info or {})})
    save_file({**kept, **arrays}, target, metadata={"dare_trace": metadata})
    return target


def text_of(files: list[TraceFile], **options: int) -> str:
    console = Console(file=io.StringIO(), width=200)
    view = TraceView(files, [], console)
    view.head()
    view.print_step(options["step"]) if "step" in options else view.play()
    return console.file.getvalue()  # type: ignore[attr-defined]


def page_data(page: Path) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found
    return dict(json.loads(found[1]))


def test_viewing_needs_no_torch(trace_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dare.cli import app\n"
        f"app(['view', {str(trace_path)!r}], standalone_mode=False)\n"
        f"app(['view', {str(trace_path)!r}, '--html', {str(tmp_path / 'v.html')!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_page_is_self_contained_and_cannot_be_broken_out_of(trace_path: Path, tmp_path: Path) -> None:
    page = write_trace_page([load_trace(trace_path)], tmp_path / "v.html")
    parsed = Page(page.read_text("utf-8"))
    assert parsed.tags.count("script") == 2  # the data and the viewer, whatever the pieces say
    assert not {"link", "img", "iframe"} & set(parsed.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in parsed.attributes}
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert any(value.startswith("default-src 'none'") for name, value in parsed.attributes if name == "content")
    raw = page.read_text("utf-8")
    assert NASTY[0] not in raw
    assert "\u2028" not in raw
    assert "\x1b" not in raw
    (trace,) = page_data(page)["traces"]  # type: ignore[misc]
    assert NASTY[0] in trace["pieces"].values()
    assert "⏎" in trace["pieces"].values()


def test_script_writes_text_and_never_markup() -> None:
    script = (TEMPLATES / "view.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(|XMLHttp", script
    )


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("options", [{"block_length": 4}, {"edit_threshold": 0.02, "temperature": 1.0}])
def test_script_rebuilds_the_canvases_of_the_rollout(options: dict[str, float], tmp_path: Path) -> None:
    family = "sdar" if "edit_threshold" in options else "llada"
    file = load_trace(write_trace(tmp_path / "t.safetensors", family, **options))
    data = page_data(write_trace_page([file], tmp_path / "v.html"))
    program = (
        f"const view = require({str(TEMPLATES / 'view.js')!r});"
        "const {traces: [trace]} = JSON.parse(require('fs').readFileSync(0));"
        "console.log(JSON.stringify(trace.rows.map((row) => "
        "[...Array(row.steps.length + 1).keys()].map((n) => view.canvasAfter(trace, row, n).ids))))"
    )
    result = subprocess.run(["node", "-e", program], input=json.dumps(data), capture_output=True, text=True, check=True)
    for index, canvases in enumerate(json.loads(result.stdout)):
        row = read_row(file, index)
        assert canvases == [row.canvas(step, file.info["mask_id"]) for step in range(len(row.steps) + 1)]


def test_two_traces_share_a_page(trace_path: Path, tmp_path: Path) -> None:
    other = write_trace(tmp_path / "b.safetensors", "sdar", num_rows=3)
    page = write_trace_page([load_trace(trace_path), load_trace(other)], tmp_path / "v.html")
    assert [trace["name"] for trace in page_data(page)["traces"]] == ["a.safetensors", "b.safetensors"]  # type: ignore[attr-defined]
    with pytest.raises(DareError, match="two side by side"):
        write_trace_page([load_trace(trace_path)] * 3, tmp_path / "w.html")


def test_many_rows_are_cut_and_said(tmp_path: Path) -> None:
    file = load_trace(write_trace(tmp_path / "t.safetensors", num_rows=MAX_ROWS + 2, gen_length=4))
    page = write_trace_page([file], tmp_path / "v.html")
    assert f"the first {MAX_ROWS} of {MAX_ROWS + 2} rows" in page.read_text("utf-8")
    (trace,) = page_data(write_trace_page([file], tmp_path / "w.html", [9]))["traces"]  # type: ignore[misc]
    assert [row["label"] for row in trace["rows"]] == ["row 10"]


def test_terminal_shows_every_step_and_obeys_no_piece(trace_path: Path) -> None:
    text = text_of([load_trace(trace_path)])
    assert [f"after step {step} of 8" in text for step in range(9)] == [True] * 9
    assert "\x1b[31m" not in text
    chosen = text_of([load_trace(trace_path)], step=1)
    assert "rank 1 of 4" in chosen
    assert "not committed: rank 4 of 4" in chosen
    assert "policy low_confidence: the schedule asks for 1, highest score first" in chosen


def test_reasons_name_what_decided(tmp_path: Path) -> None:
    file = load_trace(write_trace(tmp_path / "t.safetensors", unmask="threshold", threshold=0.05, block_length=4))
    row = read_row(file, 0)
    assert rule(file.info, row.steps[0]) == "policy threshold: all above 0.05, and at least the 1 of highest score"
    for candidate in row.steps[0].candidates:
        assert candidate.score is not None
        assert candidate.is_written == (candidate.score > np.float32(0.05) or candidate.rank == 1)
    edits = load_trace(write_trace(tmp_path / "e.safetensors", "sdar", edit_threshold=0.02, temperature=1.0))
    steps = read_row(edits, 0).steps
    replaced = [(s, c) for s in steps for c in s.candidates if c.is_written and c.held != edits.info["mask_id"]]
    assert replaced
    assert all("the edit threshold 0.02" in verdict(edits.info, step, candidate) for step, candidate in replaced)


def test_a_trace_without_predictions_still_shows_its_order(trace_path: Path, tmp_path: Path) -> None:
    for family, options in (("llada", {}), ("sdar", {"edit_threshold": 0.02, "temperature": 1.0})):
        full = load_trace(write_trace(tmp_path / "full.safetensors", family, **options))
        plain = load_trace(write_trace(tmp_path / "plain.safetensors", family, num_alternatives=0, **options))
        assert any("no alternatives" in note for note in plain.missing)
        for index in range(2):
            first, second = read_row(full, index), read_row(plain, index)
            for step in range(len(first.steps) + 1):
                assert first.canvas(step, full.info["mask_id"]) == second.canvas(step, full.info["mask_id"])
        assert "no alternatives" in text_of([plain], step=1)
        write_trace_page([plain], tmp_path / "v.html")


def test_a_newer_file_is_read_as_far_as_possible(trace_path: Path, tmp_path: Path) -> None:
    new = np.zeros((3, 2), np.float32)
    file = load_trace(changed(trace_path, tmp_path / "n.safetensors", info={"version": 9}, surprise_QX=new))
    assert any("format version 9" in note for note in file.missing)
    assert read_row(file, 1).steps
    partly = load_trace(changed(trace_path, tmp_path / "p.safetensors", drop=("score_P",), info={"version": 9}))
    assert not partly.has_predictions


@pytest.mark.parametrize("name", ["eos_ids", "temperature", "decode", "policy", "labels", "pieces"])
def test_metadata_of_another_kind_is_left_out_and_said(name: str, trace_path: Path, tmp_path: Path) -> None:
    for odd in (None, "</script>", True):
        file = load_trace(changed(trace_path, tmp_path / "odd.safetensors", info={name: odd}))
        assert file.missing == [f"its metadata has no readable {name}"]
        assert read_row(file, 0).steps
        page = write_trace_page([file], tmp_path / "odd.html")
        assert f"no readable {name}" in page.read_text("utf-8")
        assert "step 1" in text_of([file], step=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ("input_BS",)}, "lacks tensors"),
        ({"info": {"mask_id": None}}, "malformed"),
        ({"info": {"decode": {"threshold": [float("nan")], "x": float("inf")}}}, "malformed"),
        ({"nfe_B": np.ones(5, np.int32)}, "malformed"),
        ({"position_M": np.array([1], np.int32)}, "malformed"),
        ({"position_P": np.full(1000, 999, np.int32)}, "malformed"),
        ({"step_map_BS": np.zeros((2, 1), np.int32)}, "malformed"),
        ({"prob_P": np.full(72, np.nan, np.float32)}, "malformed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_damaged_traces_are_refused(change: dict[str, object], message: str, trace_path: Path, tmp_path: Path) -> None:
    path = changed(trace_path, tmp_path / "d.safetensors", **change)  # type: ignore[arg-type]
    with pytest.raises(DareError, match=message):
        load_trace(path)


def test_masks_are_masks(trace_path: Path, tmp_path: Path) -> None:
    numbers = load_file(trace_path)["is_real_BS"].astype(np.float32)
    with pytest.raises(DareError, match="is_real_BS is float32, not bool"):
        load_trace(changed(trace_path, tmp_path / "d.safetensors", is_real_BS=numbers))


def test_files_that_are_no_traces_are_refused(trace_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trace_path.read_bytes()[:-10])
    other = tmp_path / "other.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, other)
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    for path, message in ((cut, "cannot be read"), (other, "not a trace file"), (text, "cannot be read")):
        result = CliRunner().invoke(app, ["view", str(path)])
        assert result.exit_code == 2
        assert message in result.output
    assert "trace file not found" in CliRunner().invoke(app, ["view", str(tmp_path / "none")]).output
    assert "no such step" in CliRunner().invoke(app, ["view", str(trace_path), "--step", "99"]).output
    assert "no such row" in CliRunner().invoke(app, ["view", str(trace_path), "--row", "3"]).output


def test_keys_move_through_the_steps(trace_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    TraceView([load_trace(trace_path)], [], console).interact(
        iter(["right", "right", "left", "end", "right", "x", "q", "home"])
    )
    seen = [int(number) for number in re.findall(r"after step (\d+) of 8", console.file.getvalue())]  # type: ignore[attr-defined]
    deduplicated = [step for index, step in enumerate(seen) if index == 0 or seen[index - 1] != step]
    assert deduplicated == [0, 1, 2, 1, 8]


def test_generate_writes_a_trace(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.safetensors"
    words = ["generate", tiny_checkpoints["sdar"], "--prompt", "1+2=", "--save-trace", path, "--json", "gen_length=8"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    row = read_row(load_trace(path), 0)
    tokens = [token for token, is_open in zip(row.final, row.is_completion, strict=True) if is_open]
    assert tokens[: len(json.loads(result.stdout)["tokens"])] == json.loads(result.stdout)["tokens"]
    assert list(path.parent.iterdir()) == [path]
