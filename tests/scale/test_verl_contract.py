"""Everything that we use of verl, with the parameters that we pass: an upgrade fails here and not in a run."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs the extra dare-dllm[verl]")

USED = {
    "verl.workers.engine_workers:TrainingWorker.__init__": ["self", "config"],
    "verl.workers.engine_workers:TrainingWorker.reset": ["self"],
    "verl.workers.engine:EngineRegistry.register": ["model_type", "backend", "device"],
    "verl.workers.engine:FSDPEngine.__init__": [
        "self",
        "model_config",
        "engine_config",
        "optimizer_config",
        "checkpoint_config",
    ],
    "verl.workers.engine:FSDPEngine.initialize": ["self"],
    "verl.single_controller.base.decorator:register": ["dispatch_mode", "blocking"],
    "verl.single_controller.ray:RayResourcePool.__init__": [
        "self",
        "process_on_nodes",
        "use_gpu",
        "max_colocate_count",
    ],
    "verl.single_controller.ray:RayClassWithInitArgs.__init__": ["self", "cls"],
    "verl.single_controller.ray:RayWorkerGroup.__init__": ["self", "resource_pool", "ray_cls_with_init"],
    "verl.utils.device:get_device_name": [],
    "verl.plugin.platform:PlatformRegistry.register": ["platform"],
}
FIELDS = {
    "verl.workers.config:FSDPEngineConfig": [
        "strategy",
        "fsdp_size",
        "use_torch_compile",
        "use_dynamic_bsz",
        "micro_batch_size_per_gpu",
        "infer_micro_batch_size_per_gpu",
    ],
    "verl.workers.config:FSDPOptimizerConfig": ["lr"],
    "verl.workers.config:TrainingWorkerConfig": [
        "model_type",
        "model_config",
        "engine_config",
        "optimizer_config",
        "checkpoint_config",
    ],
    "verl.trainer.config:CheckpointConfig": [],
}


def find(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", USED)
def test_signatures(path: str) -> None:
    have = list(inspect.signature(find(path)).parameters)
    assert [name for name in USED[path] if name not in have] == []


@pytest.mark.parametrize("path", FIELDS)
def test_config_fields(path: str) -> None:
    have = find(path).__dataclass_fields__
    assert [name for name in FIELDS[path] if name not in have] == []


def test_all_to_all_is_one_argument_per_worker() -> None:
    from verl.single_controller.base.decorator import dispatch_all_to_all

    assert dispatch_all_to_all(None, [1, 2], [3, 4]) == (([1, 2], [3, 4]), {})


def test_our_plug_in_is_an_entry_point_and_our_engine_registered() -> None:
    import verl  # noqa: F401
    from verl.plugin.platform import PlatformRegistry
    from verl.workers.engine import EngineRegistry

    from dare.executors.verl.engine import DiffusionFSDPEngine

    assert "dare.executors.verl.boot" in {entry.value for entry in entry_points(group="verl.plugins")}
    assert PlatformRegistry.get("cpu").__name__ == "CPUPlatform"
    assert EngineRegistry.get_engine_cls("diffusion_lm", "fsdp2") is DiffusionFSDPEngine
