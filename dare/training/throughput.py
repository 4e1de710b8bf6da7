"""How much of a device's peak a step uses."""

from __future__ import annotations

import torch

# Dense bfloat16 matrix products, TFLOP/s, from the vendors' data sheets; the first name within the device's counts.
_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflops(given: float | None) -> float | None:
    """The peak that utilisations are relative to: the recipe's, or that of a known GPU; None if neither is there."""
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def utilisation(model_tflop: float | None, seconds: float, peak: float | None) -> dict[str, float]:
    """`tflops`: what the updates needed, per second; `mfu`: relative to the peak. Empty without a count."""
    if model_tflop is None or seconds <= 0.0:
        return {}
    rate = model_tflop / seconds
    return {"tflops": rate} | ({} if peak is None else {"mfu": rate / peak})
