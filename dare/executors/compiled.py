"""`torch.compile` for a network, where this machine can do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dare.core.errors import DareError


def compile_network(network: nn.Module) -> None:
    """Compile `network` in place, for any batch and length; its first calls take minutes less the smaller it is.

    Raises DareError where a function of one line cannot be compiled, which is so without a C++ compiler (CPU) or
    Triton (GPU). Results differ from uncompiled ones by rounding.
    """
    device = next(network.parameters()).device
    try:
        torch.compile(_probe)(torch.ones(4, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise DareError(
            "torch.compile does not work on this machine",
            where="train.is_compiled",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix="install a C++ compiler (CPU) or Triton (GPU), or set train.is_compiled: false",
        ) from None
    network.compile(dynamic=True)


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1.0
