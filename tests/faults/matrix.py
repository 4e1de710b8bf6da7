"""Runs a case: the command with the fault, a look at what is left, the same command again, and a comparison with a run
that nothing happened to.

Processes are forked from one that has everything loaded, so that a case takes about a second.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from dare import api, cli, exports
from dare.core.errors import DareError
from dare.training.checkpoint import list_checkpoints, read_state
from tests.faults import faults, servers, workers
from tests.faults.cases import KILLED, Case
from tests.faults.places import STRUCK

_LIMIT_S = 60
_LOGS = ("metrics.jsonl", "eval.jsonl", "validation.jsonl", "samples.jsonl")
_MODEL = {"family": "llada", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "max_length": 32}
_COMMON: dict[str, Any] = {
    "seed": 3,
    "model": {"create": _MODEL},
    "task": {"name": "tests.even_digits:EvenDigits", "train_size": 12, "eval_size": 4},
    "decode": {"gen_length": 4, "block_length": 4, "temperature": 1.0, "unmask": "max_prob"},
    "train": {"steps": 4, "batch_size": 4, "prompts_per_step": 2, "completions_per_prompt": 3},
    "optimizer": {"lr": 0.01},
    "evaluation": {"every": 2, "num": 4},
    "checkpoint": {"every": 2, "keep_last": 1},
    "log": {"samples_every": 1},
}
RECIPES: dict[str, dict[str, Any]] = {
    "rl": {**_COMMON, "name": "rl", "algorithm": "cj_grpo", "checkpoint": {"every": 1, "keep_last": 2}},
    "sft": {
        **_COMMON,
        "name": "sft",
        "algorithm": "sft",
        "validation": {"every": 1, "num_rows": 4, "is_best_kept": True},
    },
}


@dataclass(frozen=True)
class Outcome:
    """`problems` is empty if everything was as it has to be. `seconds`: the command with the fault."""

    case: Case
    code: int | None
    message: str
    problems: list[str]
    seconds: float
    is_skipped: bool = False


class Matrix:
    """Cases share the runs that nothing happened to. verl_python: an interpreter that has verl; None: there is none."""

    def __init__(self, folder: Path, verl_python: Path | None = None) -> None:
        self.folder, self.verl_python = folder, verl_python
        torch.set_num_threads(1)
        for name, recipe in RECIPES.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
            api.train(folder / f"{name}.yaml", folder / name / "run")  # here, so that forks find everything loaded
        exports.export(folder / "rl" / "run", folder / "export")
        self.port = servers.free_port()

    def _prepare_remote(self) -> None:
        """The run that nothing happened to, with rollouts on a server, if there is none yet."""
        if (self.folder / "remote").exists():
            return
        checkpoint = servers.make_checkpoint(self.folder / "sdar")
        recipe = {**RECIPES["rl"], "name": "remote", **servers.remote_options(checkpoint, self.port)}
        (self.folder / "remote.yaml").write_text(yaml.safe_dump(recipe))
        with servers.serving(checkpoint, self.port, self.folder):
            api.train(self.folder / "remote.yaml", self.folder / "remote" / "run")

    def _prepare_verl(self) -> None:
        if (self.folder / "verl").exists():
            return
        recipe = {**RECIPES["rl"], "name": "verl", **workers.OPTIONS}
        (self.folder / "verl.yaml").write_text(yaml.safe_dump(recipe))
        code, text = self._command(self.folder / "verl", "verl", "run")
        if code != 0:
            raise RuntimeError(f"the run on workers that nothing happened to ended with {code}: {text[-300:]}")

    def _server(self, case: Case, place: Path) -> AbstractContextManager[None]:
        """A new server for a command, if it needs one."""
        if case.recipe != "remote":
            return nullcontext()
        return servers.serving(self.folder / "sdar", self.port, place)

    def run(self, case: Case) -> Outcome:
        """The outcome of a case, found out by a process of its own."""
        if case.recipe == "remote":
            self._prepare_remote()
        if case.recipe == "verl" and self.verl_python is None:
            return Outcome(case, None, "needs verl: --verl-python", [], 0.0, is_skipped=True)
        if case.recipe == "verl":
            self._prepare_verl()
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)

        def work() -> int:
            if case.volume is not None:
                try:
                    faults.own_volume(place, case.volume)
                except OSError as error:
                    report.write_text(json.dumps({"skipped": str(error)}))
                    return 0
            report.write_text(json.dumps(self._examine(case, place)))
            return 0

        limit = 3 * workers.LIMIT_S if case.recipe == "verl" else _LIMIT_S
        code = _wait(_fork(work, self.folder / "case.txt"), limit)
        STRUCK.unlink(missing_ok=True)
        found = json.loads(report.read_text()) if report.exists() else {"problems": [f"the case ended with {code}"]}
        return Outcome(
            case,
            found.get("code"),
            found.get("skipped") or found.get("message", ""),
            found.get("problems", []),
            found.get("seconds", 0.0),
            "skipped" in found,
        )

    def _examine(self, case: Case, place: Path) -> dict[str, Any]:
        is_export = case.verb == "export"
        STRUCK.unlink(missing_ok=True)

        def inject() -> None:
            case.inject(place)

        def command(before: Callable[[], None] | None = None) -> tuple[int | None, str]:
            if is_export:
                return self._export(self.folder / "rl" / "run", place / "export", before)
            fault = (str(STRUCK), case.fault, case.place) if before is not None and case.recipe == "verl" else None
            return self._command(place, case.recipe, "run", case.options, before, fault)

        start = time.monotonic()
        with self._server(case, place):
            code, text = command(inject)
        seconds = time.monotonic() - start
        problems = [] if code == case.code else [f"exit code {code}, not {case.code}: {text[-300:]}"]
        problems += [] if STRUCK.exists() else ["the fault did not strike"]
        problems += _message_problems(case, text)
        if case.recipe == "remote" and f"http://127.0.0.1:{self.port}" not in text:
            problems.append("does not name the server")
        if case.recipe == "verl" and workers.survivors(STRUCK):
            problems.append("a worker is left")
        if os.path.ismount(place) and case.fault == "read-only folder":
            faults.unmount(place)
        (place / faults.BALLAST).unlink(missing_ok=True)
        target = place / ("export" if is_export else "run")
        problems += _half_written(target, is_killed=code == KILLED)
        if case.damage is not None:
            case.damage(place)
        with self._server(case, place):
            code_again, text_again = command()
        if is_export and (target / "config.json").exists() and "exist" in text_again:
            code_again = 0  # the first one came so far
        if code_again != 0:
            problems.append(f"the second command ended with {code_again}: {text_again[-300:]}")
        elif is_export:
            problems += _differences(self.folder / "export", target)
        else:
            problems += _run_differences(self.folder / case.recipe / "run", target)
        return {"code": code, "message": _summary(text), "problems": problems, "seconds": seconds}

    def _command(
        self,
        folder: Path,
        recipe: str,
        out: str,
        options: tuple[str, ...] = (),
        before: Callable[[], None] | None = None,
        worker_fault: tuple[str, str, str] | None = None,
    ) -> tuple[int | None, str]:
        arguments = ["train", str(self.folder / f"{recipe}.yaml"), *options]
        arguments += ["--out", str(folder / out), "--resume", "auto", "--quiet"]
        if recipe == "verl" and self.verl_python is not None:
            output = self.folder / "output.txt"
            code = workers.run(self.verl_python, arguments, output, worker_fault)
            return code, output.read_text(errors="replace")
        return self._dare(arguments, before)

    def _export(self, run: Path, to: Path, before: Callable[[], None] | None = None) -> tuple[int | None, str]:
        return self._dare(["export", str(run), "--to", str(to)], before)

    def _dare(self, arguments: list[str], before: Callable[[], None] | None) -> tuple[int | None, str]:
        """The command in a process of its own; its exit code, None if it took too long, and what it said."""

        def work() -> int:
            if before is not None:
                before()
            try:
                cli.app(arguments, prog_name="dare")
            except SystemExit as error:
                return error.code if isinstance(error.code, int) else 1
            return 0

        output = self.folder / "output.txt"
        code = _wait(_fork(work, output))
        return code, output.read_text(errors="replace")


def _fork(work: Callable[[], int], output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: int, limit: float = _LIMIT_S) -> int | None:
    """How the child ended: its exit code, or minus the signal; None if it had to be killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _message_problems(case: Case, text: str) -> list[str]:
    """One message, the right one, and no traceback."""
    errors = re.findall(r"^error: .*", text, re.MULTILINE)
    problems = ["a traceback"] if "Traceback" in text else []
    if case.message not in text:
        problems.append(f"does not say '{case.message}': {text[-300:]}")
    if case.code in (2, 75) and len(errors) != 1:
        problems.append(f"{len(errors)} errors instead of one")
    if case.code in (0, KILLED) and text.strip():
        problems.append(f"says something: {text[-300:]}")
    return problems


def _summary(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "interrupted", "stopped", "not saved"))]
    return (errors or lines or [""])[0]


def _half_written(folder: Path, *, is_killed: bool) -> list[str]:
    """What a reader of the folder would stumble over now."""
    problems = []
    for path in folder.rglob("*") if folder.exists() else ():
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # of a process that died, under a name that nobody reads
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                lines = path.read_text().split("\n")
                whole = lines[:-1]
                if lines[-1] and not is_killed:
                    problems.append(f"{path.name} ends in the middle of a line")
                [json.loads(line) for line in whole]
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
            elif path.suffix == ".yaml":
                yaml.safe_load(path.read_text())
        except Exception as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        try:
            read_state(checkpoint)
        except DareError as error:
            problems.append(str(error))
    return problems


def _run_differences(whole: Path, run: Path) -> list[str]:
    """Logs and checkpoints against those of the uninterrupted run, byte for byte; and nothing beside them."""
    problems = [
        f"{name} differs"
        for name in _LOGS
        if (whole / name).exists() and (whole / name).read_bytes() != (run / name).read_bytes()
    ]
    status = json.loads((run / "run.json").read_text())["status"]
    if status != "finished":
        problems.append(f"status {status}")
    left = sorted(str(path.relative_to(run)) for path in run.rglob(".*"))
    if left:
        problems.append(f"left over: {', '.join(left)}")
    names = [path.name for path in (whole / "checkpoints").iterdir()]
    for name in names:
        problems += _differences(whole / "checkpoints" / name, run / "checkpoints" / name)
    return problems


def _differences(whole: Path, other: Path) -> list[str]:
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    found = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    if files != found:
        return [f"{other.name} holds {', '.join(map(str, found))}"]
    return [f"{other.name}/{name} differs" for name in files if _content(whole / name) != _content(other / name)]


def _content(file: Path) -> bytes:
    """The bytes; of a trainer's state without the length of the only log that holds wall time."""
    if file.name != "state.json":
        return file.read_bytes()
    state = json.loads(file.read_text())
    del state["log_bytes"]["timing"]
    return json.dumps(state).encode()
