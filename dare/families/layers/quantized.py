"""Frozen linear layers in 4 or 8 bits (QLoRA, Dettmers et al. 2023), with `bitsandbytes` for the number formats.

Its own layers run other kernels with and without a gradient; here every pass dequantises and multiplies, so that
scoring and replay stay the same function, whatever the batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dare.core.errors import DareError

Bits = Literal["8bit", "4bit"]
_BLOCK = 64  # weights that share a scale in 4 bits


def require_bitsandbytes(device: torch.device, *, where: str = "lora.quantize_base") -> Any:
    """The package `bitsandbytes`. Raises DareError if it is not installed or cannot quantise on this device.

    where  the recipe key that asks for it
    """
    try:
        import bitsandbytes
    except ImportError:
        raise DareError(
            f"{where} needs bitsandbytes, which is not installed",
            where=where,
            fix=f'pip install "dare-dllm[quantized]", or remove {where}',
        ) from None
    try:
        bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise DareError(
            f"bitsandbytes cannot quantise on {device.type}",
            where=where,
            got=str(error).partition("\n")[0],
            fix=f"install a build of bitsandbytes for this device, or remove {where}",
        ) from None
    return bitsandbytes


class QuantizedLinear(nn.Linear):
    """A linear layer whose matrix is stored as NF4 with quantised scales (4bit) or as blockwise int8 (8bit).

    formats  `functional` of what `require_bitsandbytes` returned
    """

    def __init__(self, layer: nn.Linear, bits: Bits, formats: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        flat = layer.weight.detach().flatten()
        # Rows of whole blocks: bitsandbytes 0.50 dequantises other shapes wrongly on the CPU.
        rows = functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
        if bits == "4bit":
            packed, self.quant_state = formats.quantize_4bit(rows, quant_type="nf4", compress_statistics=True)
            self.dequantize = formats.dequantize_4bit
        else:
            packed, self.quant_state = formats.quantize_blockwise(rows)
            self.dequantize = formats.dequantize_blockwise
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.full_dtype = flat.dtype

    def full_weight(self) -> Tensor:
        """[O, I]: the matrix that the layer multiplies with."""
        rows: Tensor = self.dequantize(self.weight.data, self.quant_state)
        flat = rows.flatten()[: self.out_features * self.in_features]
        return flat.view(self.out_features, self.in_features).to(self.full_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x W^T; W is dequantised again for the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.full_weight())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.full_weight(), None
