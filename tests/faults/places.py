"""Where a fault strikes: inside which function, in which phase of which step. Only functions are wrapped; the program
itself knows nothing of it."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare.training.session import Session

Fault = Callable[[], None]
STRUCK = Path(tempfile.gettempdir()) / f"dare-fault-{os.getpid()}"  # exists once a fault has struck


@dataclass(frozen=True)
class Place:
    """The `count`-th call of the function `module:name` while the run is in `phase` ("" for any, also outside a run).

    is_after  strike when the call has returned instead of before it
    """

    function: str
    phase: str = ""
    count: int = 1
    is_after: bool = False


PLACES = {
    "load": Place("dare.executors.local:build_family"),
    "first evaluation": Place("dare.executors.local:denoise", "step 0, evaluate"),
    "rollout": Place("dare.rollout.engine:propose", "step 2, rollout", 2),
    "reward": Place("tests.even_digits:EvenDigits.reward", "step 2, reward", 3),
    "update": Place("dare.training.optim:Optimizer.step", "step 2, update"),
    "update, weights changed": Place("dare.training.optim:Optimizer.step", "step 2, update", is_after=True),
    "log": Place("dare.core.files:JsonLines.write", "step 2, update"),
    "evaluate": Place("dare.executors.local:denoise", "step 2, evaluate"),
    "save": Place("dare.executors.local:write_tensors", "step 2, save"),
    "save, weights written": Place("dare.training.checkpoint:write_json", "step 2, save"),
    "save, renamed": Place("dare.core.files:sync_directory", "step 2, save", 3, is_after=True),
    "prune": Place("dare.training.checkpoint:list_checkpoints", "step 3, save"),
    "data": Place("dare.training.offline:batch_at", "step 2, data"),
    "validate": Place("dare.training.offline:validate", "step 2, validate"),
    "save the best": Place("dare.executors.local:write_tensors", "step 1, save"),
    "best, old one aside": Place("pathlib:Path.rename", "step 1, save"),
    "export, load": Place("dare.exports:load_checkpoint"),
    "export": Place("dare.exports:save_family", is_after=True),
    "export, written": Place("dare.core.files:sync_directory"),
    "finish": Place("dare.training.session:Session.close"),
    "weights to server": Place("dare.remote.fleet:Server.ensure", "step 2, rollout"),
    "row of server": Place("dare.remote.fleet:Server.generate", "step 2, rollout", 2),
    "row of server, evaluate": Place("dare.remote.fleet:Server.generate", "step 2, evaluate", 2),
}


def strike(place: Place, fault: Fault) -> None:
    """Wrap the place's function so that the fault happens there, once."""
    where = _watch_phases()
    holder, name, original = _find(place.function)
    num_calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        is_here = place.phase in ("", where[0])
        num_calls += is_here
        is_due = is_here and num_calls == place.count
        if is_due:
            STRUCK.touch()
        if is_due and not place.is_after:
            fault()
        result = original(*args, **options)
        if is_due and place.is_after:
            fault()
        return result

    setattr(holder, name, wrapped)


def change_result(function: str, phase: str, change: Callable[[Any], Any]) -> None:
    """Let a function return something else in one phase: NaN, say."""
    where = _watch_phases()
    holder, name, original = _find(function)

    def wrapped(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if where[0] != phase:
            return result
        STRUCK.touch()
        return change(result)

    setattr(holder, name, wrapped)


def _watch_phases() -> list[str]:
    """A list whose one entry is the phase that the run is in."""
    current, enter = [""], Session.enter

    def entered(session: Session, name: str) -> None:
        enter(session, name)
        current[0] = session.place

    Session.enter = entered  # type: ignore[method-assign]
    return current


def _find(function: str) -> tuple[Any, str, Callable[..., Any]]:
    module, _, path = function.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    return holder, name, getattr(holder, name)
