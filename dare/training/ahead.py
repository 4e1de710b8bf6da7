"""Rollouts of a run, one step ahead of the updates if the recipe says so.

Ahead, the rollout of step t + 1 is made with the weights that step t starts from, so it does not have to wait for the
update of step t: from step 2 on, updates are made on rollouts of weights that are one step old. What is ahead is part
of a checkpoint, since the weights that made it are gone when a run is continued.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dare.core.errors import DareError
from dare.core.types import Canvas, Drafts, Edits, TraceBatch, Tree

_NAME = "ahead"
_NESTED: dict[str, type] = {"canvas": Canvas, "edits": Edits, "drafts": Drafts, "tree": Tree}


@dataclass(frozen=True)
class Rollout:
    """The rollout of `step`, made with the weights after `weights_step` steps."""

    step: int
    weights_step: int
    trace: TraceBatch

    @property
    def staleness(self) -> int:
        """Steps that were done between the weights that made it and those that are updated with it."""
        return self.step - 1 - self.weights_step


class Rollouts:
    """Gives the rollout of each step in order; `generate` makes that of a step with the weights of now."""

    def __init__(self, generate: Callable[[int], TraceBatch], *, is_ahead: bool) -> None:
        self._generate = generate
        self._is_ahead = is_ahead
        self._next: Rollout | None = None
        self._taken: Rollout | None = None

    def take(self, step: int) -> Rollout:
        """The rollout of `step`, after which that of the next step is made if this run is ahead."""
        found = self._next or Rollout(step, step - 1, self._generate(step))
        if found.step != step:
            raise ValueError(f"the rollout at hand is that of step {found.step}, not {step}")
        self._next = Rollout(step + 1, step - 1, self._generate(step + 1)) if self._is_ahead else None
        self._taken = found
        return found

    def save(self, directory: Path, step: int) -> None:
        """Add the rollout after `step`, if it was made ahead, to the trainer's state in a checkpoint of that step.

        A run may stop before the update that a rollout was taken for; then that one is the next of the checkpoint.
        """
        ahead = [made for made in (self._taken, self._next) if made is not None and made.step == step + 1]
        if not self._is_ahead or not ahead:
            return
        tensors, plain = _flat(ahead[0].trace, "")
        info = {"step": ahead[0].step, "weights_step": ahead[0].weights_step, "trace": plain}
        save_file(tensors, _path(directory), metadata={_NAME: json.dumps(info)})

    def load(self, directory: Path) -> None:
        """Take over what `save` wrote. Raises DareError if it cannot be read."""
        if not self._is_ahead:
            return
        path = _path(directory)
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()[_NAME])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DareError("the rollout ahead of the checkpoint cannot be read", where=str(path), got=error) from None
        trace: TraceBatch = _built(TraceBatch, tensors, info["trace"], "")
        self._next = Rollout(info["step"], info["weights_step"], trace)


def _path(directory: Path) -> Path:
    return directory / "trainer" / f"{_NAME}.safetensors"


def _flat(record: Any, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain data of a record and of those within it, under dotted names."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for field in fields(record):
        value, name = getattr(record, field.name), prefix + field.name
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous()
        elif field.name in _NESTED and value is not None:
            inner = _flat(value, f"{name}.")
            tensors |= inner[0]
            plain |= inner[1]
        else:
            plain[name] = value
    return tensors, plain


def _built(kind: type, tensors: dict[str, Tensor], plain: dict[str, Any], prefix: str) -> Any:
    values: dict[str, Any] = {}
    for field in fields(kind):
        name = prefix + field.name
        if name in tensors:
            values[field.name] = tensors[name]
        elif name in plain:
            value = plain[name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        else:
            values[field.name] = _built(_NESTED[field.name], tensors, plain, f"{name}.")
    return kind(**values)
