"""`torch`, loaded when first used, so that `dare --help`, `list`, `check` and `show` stay instant.

Modules in `core`, `diffusion`, `objectives` and `algorithms` take torch from here; they must not touch
it at import time (no decorators, no base classes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _LazyTorch:
        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _LazyTorch()
