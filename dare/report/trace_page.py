"""The trace viewer: one self-contained page with a time slider, for one trace or two side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.files import write_text
from dare.report.templating import environment
from dare.report.trace_rows import Row, read_row, rule, verdict
from dare.rollout.trace_file import TraceFile
from dare.terminal.canvas import EOS, MASKED
from dare.terminal.text import visible

MAX_ROWS = 8


def write_trace_page(files: Sequence[TraceFile], out: Path, rows: Sequence[int] = ()) -> Path:
    """Write the page of one or two traces atomically; returns `out`.

    rows  which rows to include, 0-based; default: the first `MAX_ROWS`
    """
    if not 1 <= len(files) <= 2:
        raise DareError("the viewer shows one trace, or two side by side", got=f"{len(files)} traces")
    traces = [_trace(file, rows) for file in files]
    page = (
        environment()
        .get_template("view.html.j2")
        .render(
            title=" and ".join(file.path.name for file in files),
            notes=[f"{file.path.name}: {note}" for file in files for note in notes(file, rows)],
            data=embedded({"traces": traces}),
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def notes(file: TraceFile, rows: Sequence[int] = ()) -> list[str]:
    """What the page does not show, in plain words."""
    found = list(file.missing)
    if not rows and file.num_rows > MAX_ROWS:
        found.append(f"the first {MAX_ROWS} of {file.num_rows} rows are shown; choose others with --row")
    return found


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or start markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def shown_piece(file: TraceFile, token: int) -> str:
    """How a token looks in a canvas: one line, nothing invisible, short names for EOS and the mask."""
    if token == file.info["mask_id"]:
        return MASKED
    if token in file.info.get("eos_ids", ()):
        return EOS
    text = file.piece(token)
    return visible(text) if text.strip(" ") else text.replace(" ", "␣")


def facts(file: TraceFile) -> list[tuple[str, str]]:
    """What the trace was made with, in a few words."""
    info, decode = file.info, file.info.get("decode", {})
    policy = info.get("policy", {})
    found = [("family", str(info.get("family", "?"))), ("policy", str(policy.get("name", "?")))]
    found.append(("temperature", f"{info.get('temperature', 0):g}"))
    names = ("block_length", "steps_per_block", "threshold", "edit_threshold", "cache", "cfg_scale")
    defaults = (None, "auto", 0.0)
    found += [(name.replace("_", " "), str(decode[name])) for name in names if decode.get(name) not in defaults]
    if decode.get("remask", "none") != "none":
        found.append(("remask", str(decode["remask"])))
    return found


def _trace(file: TraceFile, rows: Sequence[int]) -> dict[str, Any]:
    chosen = list(rows) or list(range(min(file.num_rows, MAX_ROWS)))
    read = [read_row(file, index) for index in chosen]
    tokens = {token for row in read for token in (*row.first, *row.final)}
    for row in read:
        for step in row.steps:
            for c in step.candidates:
                tokens |= {c.token, c.held, *(token for token, _ in c.alternatives)}
    return {
        "name": file.path.name,
        "mask": file.info["mask_id"],
        "facts": facts(file),
        "pieces": {str(token): shown_piece(file, token) for token in sorted(tokens)},
        "rows": [_row(file, row) for row in read],
    }


def _row(file: TraceFile, row: Row) -> dict[str, Any]:
    steps = []
    for step in row.steps:
        opened = [
            {
                "at": c.position,
                "held": c.held,
                "token": c.token,
                "prob": None if c.prob is None else round(c.prob, 5),
                "rank": c.rank,
                "written": c.is_written,
                "why": verdict(file.info, step, c),
                "tops": [[token, round(prob, 5)] for token, prob in c.alternatives],
            }
            for c in step.candidates
        ]
        steps.append({"open": opened, "remasked": step.remasked, "rule": rule(file.info, step)})
    return {
        "label": row.label,
        "first": row.first,
        "completion": [int(value) for value in row.is_completion],
        "borders": row.borders,
        "order": row.order,
        "steps": steps,
    }
