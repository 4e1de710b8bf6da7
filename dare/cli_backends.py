"""`dare eval --backend lm-eval | opencompass`: a public harness around the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dare.core.errors import DareError, unknown_name

_EXTRAS = {"lm-eval": "lm_eval", "opencompass": "opencompass"}  # and the module that it installs


@dataclass(frozen=True)
class HarnessCall:
    """The words of `dare eval` that concern a harness."""

    harness: str
    checkpoint: str
    tasks: list[str]
    preset: str | None
    published: str | None
    overrides: dict[str, Any]
    out: Path | None
    place: tuple[str, str, str | None]  # device, dtype, base
    is_weak_sandbox_allowed: bool


def run_harness(call: HarnessCall, on_result: Callable[[str, dict[str, Any]], None] | None) -> dict[str, Any]:
    """The results by task. Raises DareError for a harness that is unknown or not installed, and as the harness does."""
    if call.harness not in _EXTRAS:
        raise unknown_name("back end", call.harness, _EXTRAS, where="--backend")
    _require(call.harness)
    from dare.api import family_of
    from dare.harness.place import load_backend
    from dare.harness.planning import plan_tasks

    backend = load_backend(call.checkpoint, *call.place)
    planned = plan_tasks(
        call.preset,
        call.tasks,
        family=family_of(backend, call.preset),
        checkpoint=call.checkpoint,
        model=call.published,
        overrides=call.overrides,
    )
    out = call.out or Path("runs") / "eval" / f"{Path(call.checkpoint).name}-{call.harness}"
    is_weak = call.is_weak_sandbox_allowed
    if call.harness == "opencompass":
        from dare.harness.compass.run import run_opencompass

        return run_opencompass(backend, planned, out, is_weak_sandbox_allowed=is_weak, on_result=on_result)
    from dare.harness.lm_run import run_lm_eval

    return run_lm_eval(backend, planned, out, is_weak_sandbox_allowed=is_weak, on_result=on_result)


def print_result(task: str, result: dict[str, Any]) -> None:
    """One line on standard output."""
    from dare.harness.result import result_line

    typer.echo(result_line(task, result))


def _require(harness: str) -> None:
    from importlib.util import find_spec

    if find_spec(_EXTRAS[harness]) is None:
        raise DareError(f"{harness} is not installed here", fix=f'pip install "dare-dllm[{harness}]"')
