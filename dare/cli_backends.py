"""`dare eval --backend lm-eval | opencompass`: a public harness around the loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dare.core.errors import DareError, unknown_name
from dare.core.files import read_json

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
    if not _is_installed(call.harness):
        if call.harness == "opencompass":
            return _run_apart(call, is_json=on_result is None)
        raise DareError(f"{call.harness} is not installed here", fix=f'pip install "dare-dllm[{call.harness}]"')
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


def _is_installed(harness: str) -> bool:
    from importlib.util import find_spec

    return find_spec(_EXTRAS[harness]) is not None


def _run_apart(call: HarnessCall, *, is_json: bool) -> dict[str, Any]:
    """OpenCompass in an environment of its own, the model in a server of this one."""
    import json
    import subprocess

    from dare.harness.environment import find_environment, requirements_of
    from dare.harness.result import result_folder
    from dare.harness.server import served

    if call.preset is not None:
        raise DareError(
            "presets need OpenCompass in this environment",
            where="--preset",
            got=call.preset,
            fix="give --tasks and the decode options, or pip install 'dare-dllm[opencompass]'",
        )
    out = call.out or Path("runs") / "eval" / f"{Path(call.checkpoint).name}-{call.harness}"
    device, dtype, base = call.place
    words = ["--device", device, "--dtype", dtype, *(["--base", base] if base else [])]
    overrides = {"task.style": _style(call), **call.overrides}
    python = find_environment(call.harness, requirements_of(call.harness))
    with served(call.checkpoint, words) as url:
        command = [
            str(python),
            "-m",
            "dare.cli",
            "eval",
            url,
            "--backend",
            call.harness,
            "--tasks",
            ",".join(call.tasks),
        ]
        command += ["--out", str(out), *(["--allow-weak-sandbox"] if call.is_weak_sandbox_allowed else [])]
        command += [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
        done = subprocess.run(command, stdout=subprocess.DEVNULL if is_json else None)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)  # which has said why
    return {task: read_json(result_folder(out, task) / "result.json", "the result") for task in call.tasks}


def _style(call: HarnessCall) -> str:
    """What the model's tokenizer says, since a server does not; likelihoods are those of text."""
    from dare.families.tokenizer import load_tokenizer
    from dare.families.weights import resolve_checkpoint
    from dare.training.checkpoint import resolve_model_path

    tokenizer = load_tokenizer(resolve_checkpoint(resolve_model_path(call.checkpoint)))
    is_chat = tokenizer is not None and tokenizer.chat_template and call.overrides.get("task.method") != "likelihood"
    return "chat" if is_chat else "text"
