"""A machine without an accelerator, as a verl platform.

verl 0.9 takes any machine on which it finds no accelerator for one with CUDA. This platform is chosen there instead,
through verl's own registry; with a GPU present it steps aside.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

_ZEROS = (
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "device_count",
)
_NOTHING = (
    "set_device",
    "empty_cache",
    "synchronize",
    "reset_peak_memory_stats",
    "ipc_collect",
    "manual_seed",
    "manual_seed_all",
)


def _device_module() -> types.ModuleType:
    """The part of `torch.cuda` that verl calls, for a device that has no memory of its own."""
    module = types.ModuleType("dare_cpu_device")
    for name in _ZEROS:
        setattr(module, name, lambda *_args: 0)
    for name in _NOTHING:
        setattr(module, name, lambda *_args: None)
    found: dict[str, Any] = {
        "mem_get_info": lambda *_args: (0, 1),
        "current_device": lambda: torch.device("cpu"),
        "is_available": lambda: False,
        "get_device_name": lambda *_args: "CPU",
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }
    for name, value in found.items():
        setattr(module, name, value)
    return module


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):  # type: ignore[misc]
    """Gloo for communication, no device memory, no profiler."""

    _module = _device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not torch.cuda.is_available()

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 0

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs asynchronously."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There is no allocator to set."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """There is no device profiler."""

    def profiler_stop(self) -> None:
        """There is no device profiler."""

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num: int) -> dict[str, int]:
        return {"num_cpus": num}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None
