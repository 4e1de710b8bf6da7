"""Small real traces, with pieces that a page must not obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.rollout.engine import denoise
from dare.rollout.trace_file import save_trace
from tests.conftest import tiny_family

NASTY = ["</script><script>alert(1)</script>", "<!--", "\n", " ", "\u2028", "&amp;", "漢字", "\x1b[31m"]


def piece(token: int) -> str:
    return NASTY[token] if token < len(NASTY) else f"t{token}"


def write_trace(
    path: Path, family: str = "llada", *, num_alternatives: int = 3, num_rows: int = 2, **decode: Any
) -> Path:
    options = Decode(**{"gen_length": 8, **decode})
    prompts = [[1, 2, 3], [4, 5, 6, 7, 1], *([[8]] * (num_rows - 2))][:num_rows]
    tiny = tiny_family(family)
    trace = denoise(tiny, prompts, options, Key(0), list(range(num_rows)), num_alternatives=num_alternatives)
    save_trace(path, trace, spec=tiny.spec, decode=options, piece=piece)
    return path
