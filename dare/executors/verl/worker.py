"""The Ray actor: verl's `TrainingWorker` around our engine, with one method per verb."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name
from verl.workers.engine_workers import TrainingWorker

from dare.core.decode import Decode
from dare.core.engine import Role
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import AuxLoss, TraceBatch
from dare.executors.verl import engine as engine  # registers the engine that the config asks for
from dare.executors.verl.split import Shard

Verb = TypeVar("Verb", bound=Callable[..., Any])

# Every argument is a list with one entry per worker; what comes back is a list of futures.
_each: Callable[[Verb], Verb] = register(dispatch_mode=Dispatch.ALL_TO_ALL, blocking=False)


class DiffusionWorker(TrainingWorker):  # type: ignore[misc]
    """Verbs of `core.engine.Engine`, after `build`."""

    def __init__(self, config: Any) -> None:
        _join_group()
        super().__init__(config)

    @_each
    def build(self) -> DareError | None:
        """See `DiffusionFSDPEngine.initialize`. A user's mistake comes back as a value, which keeps its fields."""
        try:
            self.engine.initialize()
        except DareError as error:
            return error
        return None

    @_each
    def generate(
        self,
        prompts: list[list[int]],
        decode: Decode,
        key: Key,
        sample_ids: list[int],
        has_drafts: bool,
        branching: tuple[int, ...],
        num_alternatives: int,
    ) -> TraceBatch | DareError | None:
        """See `DiffusionFSDPEngine.generate`."""
        try:
            found: TraceBatch | None = self.engine.generate(
                prompts, decode, key, sample_ids, has_drafts, branching, num_alternatives
            )
        except DareError as error:
            return error
        return found

    @_each
    def score(self, shard: Shard, is_reference: bool, role: Role) -> Tensor:
        """See `DiffusionFSDPEngine.score`."""
        found: Tensor = self.engine.score(shard, is_reference, role)
        return found

    @_each
    def predict(self, shard: Shard) -> Tensor:
        """See `DiffusionFSDPEngine.predict`."""
        found: Tensor = self.engine.predict(shard)
        return found

    @_each
    def accumulate(self, shard: Shard, grad_RS: Tensor, auxiliary: AuxLoss | None, role: Role) -> tuple[Tensor, Tensor]:
        """See `DiffusionFSDPEngine.accumulate`."""
        found: tuple[Tensor, Tensor] = self.engine.accumulate(shard, grad_RS, auxiliary, role)
        return found

    @_each
    def step(self, role: Role) -> dict[str, float] | DareError:
        """See `DiffusionFSDPEngine.step`."""
        try:
            found: dict[str, float] = self.engine.step(role)
        except DareError as error:
            return error
        return found

    @_each
    def publish(self, version: int) -> None:
        """Generate with the weights of now, under this version."""
        self.engine.publish(version)

    @_each
    def save(self, directory: Path) -> None:
        """See `DiffusionFSDPEngine.save`."""
        self.engine.save(directory)

    @_each
    def load(self, directory: Path) -> DareError | None:
        """See `DiffusionFSDPEngine.load`."""
        try:
            self.engine.load(directory)
        except DareError as error:
            return error
        return None


def _join_group() -> None:
    """On a CPU verl would name gloo twice for one device; it takes a group that is already there as it is."""
    if get_device_name() == "cpu" and not dist.is_initialized():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        dist.init_process_group(
            "gloo",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            init_method=os.environ.get("DIST_INIT_METHOD"),
            timeout=timedelta(minutes=30),
        )
