"""Starting, calling and stopping verl's workers. Only processes that were started here are ever ended."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.executors.choices import VerlOptions

_PLATFORM = "VERL_PLATFORM"
_START_S = 900.0  # longest that workers may take to load the model, beside `timeout_s`, seconds
_ROOM_S = 60.0  # how long to wait for places that others are giving back, seconds


class Workers(Protocol):
    """As many workers as `num`, each with the verbs of `DiffusionWorker`."""

    num: int

    def each(self, verb: str, *arguments: list[Any]) -> list[Any]:
        """Call a verb on all workers at once, each with its own entry of every argument; the results in order.

        Raises DareError if a worker reports a user's mistake, has died or does not answer in time.
        """
        ...

    def close(self) -> None: ...


def start(
    recipe: Recipe, tokenizer: Any, options: VerlOptions, *, needs_reference: bool, critic_lr: float | None
) -> Workers:
    """The workers, their model built. Raises DareError if verl is missing or there is no room for them."""
    if options.in_process and options.num_workers != 1:
        raise DareError(
            "one process can hold one worker",
            where="executor",
            got=f"in_process: true, num_workers: {options.num_workers}",
            fix="remove in_process, or set num_workers: 1",
        )
    if not torch.cuda.is_available():
        os.environ.setdefault(_PLATFORM, "cpu")
    try:
        import verl  # noqa: F401

        import dare.executors.verl.boot  # noqa: F401  # also where the entry points are not installed
        from dare.executors.verl.config import worker_config
    except ImportError as error:
        raise DareError(
            "the verl executor needs verl, which cannot be imported",
            where="executor",
            got=f"{type(error).__name__}: {error}",
            fix="pip install 'dare-dllm[verl]', or use executor: local",
        ) from None
    config = worker_config(recipe, tokenizer, options, needs_reference=needs_reference, critic_lr=critic_lr)
    if options.in_process:
        return _InProcess(config)
    return _OnRay(config, options)


class _InProcess:
    """The worker as a plain object: no Ray, one process group of one."""

    num = 1

    def __init__(self, config: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from dare.executors.verl.worker import DiffusionWorker

        self.worker = DiffusionWorker(config)
        self.each("build")

    def each(self, verb: str, *arguments: list[Any]) -> list[Any]:
        call: Callable[..., Any] = getattr(self.worker, verb)
        return [_checked(call(*(argument[0] for argument in arguments)))]

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _OnRay:
    """Actors of a Ray cluster, which is started here unless there is one to join."""

    def __init__(self, config: Any, options: VerlOptions) -> None:
        import ray
        from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

        from dare.executors.verl.worker import DiffusionWorker

        self.num, self.timeout_s = options.num_workers, max(options.timeout_s, _START_S)
        self.is_ours = not ray.is_initialized()
        self.has_own_cluster = self.is_ours and options.address is None
        if self.is_ours:
            _connect(options)
        context = ray.get_runtime_context()
        self.temporary = Path(context.get_temp_dir())
        self.logs = str(self.temporary / context.get_session_name() / "logs")
        self.has_failed = False
        has_gpu = torch.cuda.is_available()
        _require_room("GPU" if has_gpu else "CPU", self.num)
        self.pool = RayResourcePool([self.num], use_gpu=has_gpu, max_colocate_count=1)
        actor = RayClassWithInitArgs(ray.remote(DiffusionWorker), config=config)
        self.group = RayWorkerGroup(self.pool, actor, device_name="cuda" if has_gpu else "cpu")
        try:
            self.each("build")
        except BaseException:
            self.close()
            raise
        self.timeout_s = options.timeout_s

    def each(self, verb: str, *arguments: list[Any]) -> list[Any]:
        from dare.executors.verl.calls import answers

        try:
            return answers(verb, getattr(self.group, verb)(*arguments), self.timeout_s, self.logs)
        except BaseException:
            self.has_failed = True
            raise

    def close(self) -> None:
        import ray

        for worker in self.group.workers:
            ray.kill(worker)
        for placement in self.pool.pgs or []:  # a killed actor does not give its place back
            ray.util.remove_placement_group(placement)
        if self.is_ours:
            ray.shutdown()
            if self.has_own_cluster and not self.has_failed:  # after a failure its logs are of use
                shutil.rmtree(self.temporary, ignore_errors=True)


def _connect(options: VerlOptions) -> None:
    import ray

    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if _PLATFORM in os.environ:
        environment[_PLATFORM] = os.environ[_PLATFORM]
    runtime = {"env_vars": environment}
    try:
        if options.address is not None:
            ray.init(address=options.address, namespace="dare", runtime_env=runtime, log_to_driver=False)
            return
        ray.init(
            namespace="dare",
            num_cpus=max(4, 2 * options.num_workers),
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=tempfile.mkdtemp(prefix="dare-ray-"),
            runtime_env=runtime,
        )
    except ConnectionError as error:
        raise DareError(
            "there is no Ray cluster to join",
            where="executor.address",
            got=f"{options.address}: {error}",
            fix="start one (ray start --head), or remove address to start one here",
        ) from None


def _require_room(kind: str, num: int) -> None:
    """Raises DareError if the cluster is too small, or still too full after a while: places are given back late."""
    import ray

    total, deadline = int(ray.cluster_resources().get(kind, 0)), time.monotonic() + _ROOM_S
    free = int(ray.available_resources().get(kind, 0))
    while total >= num > free and time.monotonic() < deadline:
        time.sleep(0.5)
        free = int(ray.available_resources().get(kind, 0))
    if free < num:
        raise DareError(
            f"the cluster has too few free {kind}s for the workers",
            where="executor.num_workers",
            got=f"{num} workers, {free} of {total} {kind}s free",
            fix=f"set executor.num_workers to {max(free, 1)} or fewer, add nodes, or wait for other jobs",
        )


def _checked(result: Any) -> Any:
    if isinstance(result, DareError):
        raise result
    return result
