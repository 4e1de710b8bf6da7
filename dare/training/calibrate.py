"""Two short networks, one layer apart, run once each: what a layer costs, and from that all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dare.core.recipe import Recipe
from dare.core.types import Canvas, Views
from dare.families.base import Family
from dare.training.live_bytes import LiveBytes
from dare.training.optim import Optimizer
from dare.training.plan import StepCost, gradient_bytes, optimizer_bytes, weight_bytes
from dare.training.rollout_cost import run_forward

# Layers of the shorter network: the last one computes less than the others, and by the second one before it, layers of
# every kind that repeats are there.
_SHORT = 3
_REPEATS = 2


@dataclass(frozen=True)
class _Cost:
    num_bytes: float
    lasting_bytes: float  # weights, gradients, optimizer
    update_seconds: float
    optimizer_seconds: float
    forward_seconds: float = 0.0  # of a rollout

    def plus(self, other: _Cost, times: float) -> _Cost:
        return _Cost(
            self.num_bytes + times * other.num_bytes,
            self.lasting_bytes + times * other.lasting_bytes,
            self.update_seconds + times * other.update_seconds,
            self.optimizer_seconds + times * other.optimizer_seconds,
            self.forward_seconds + times * other.forward_seconds,
        )


def calibrate(
    outline: Family,
    device: torch.device,
    recipe: Recipe,
    views: Views,
    canvas: Canvas,
    num_tokens: int,
    rollout: tuple[int, int] | None = None,
) -> StepCost:
    """The cost of a step whose largest micro-batch is `views` and which runs `num_tokens` positions in all.

    outline     the family on the meta device; its first layers are made on `device`
    num_tokens  positions of all micro-batches; seconds grow with them
    rollout     rows and columns of a forward of a rollout, to be measured too
    Layers from the third on, but for the last one, are taken to cost the same. Time is wall time, the best of two runs.
    """
    total = outline.network.num_layers
    if total <= _SHORT + 1:
        base, layer, more = (
            _measure(outline, total, device, recipe, views, canvas, rollout),
            _Cost(0.0, 0.0, 0.0, 0.0),
            0,
        )
    else:
        base = _measure(outline, _SHORT, device, recipe, views, canvas, rollout)
        layer = _measure(outline, _SHORT + 1, device, recipe, views, canvas, rollout).plus(base, -1.0)
        more = total - _SHORT
    whole = base.plus(layer, more)
    activations = min(whole.num_bytes, layer.num_bytes * total if more else whole.num_bytes)
    share = num_tokens / max(1, int(canvas.is_real_BS.sum()))
    seconds = whole.update_seconds * share + whole.optimizer_seconds
    largest = base.plus(layer, 1.0)  # the larger of the two short networks
    calibrated = int(largest.num_bytes + largest.lasting_bytes)
    return StepCost(
        int(activations),
        int(whole.num_bytes - activations),
        max(seconds, 1e-9),
        calibrated,
        max(whole.forward_seconds, base.forward_seconds),
    )


def _measure(
    outline: Family,
    num_layers: int,
    device: torch.device,
    recipe: Recipe,
    views: Views,
    canvas: Canvas,
    rollout: tuple[int, int] | None,
) -> _Cost:
    family = _shortened(outline, num_layers, device)
    family.network.recompute = recipe.train.recompute
    optimizer = Optimizer(family.network.named_parameters(), recipe.optimizer, num_steps=_REPEATS + 2)
    factor_RS = torch.where(views.is_target_RS, -1e-3, 0.0)

    def update() -> None:
        is_packed = recipe.train.pack_length is not None
        hidden_RTD = family.view_hidden(views, canvas, is_packed=is_packed, is_read_RS=views.is_target_RS)
        total, _ = family.target_total(hidden_RTD, views, factor_RS)
        total.backward()  # type: ignore[no-untyped-call]

    update()  # gradients exist from here on, so that they are not counted
    num_bytes = _peak(update, device)
    optimizer.step()
    update_seconds, optimizer_seconds = [], []
    for _ in range(_REPEATS):
        update_seconds.append(_seconds(update, device))
        optimizer_seconds.append(_seconds(lambda: optimizer.step(), device))
    forward_seconds = 0.0
    if rollout is not None:
        with family.packed():
            forward_seconds = min(_seconds(lambda: run_forward(family, *rollout), device) for _ in range(_REPEATS + 1))
    lasting = weight_bytes(family) + gradient_bytes(family) + optimizer_bytes(family)
    return _Cost(num_bytes, lasting, min(update_seconds), min(optimizer_seconds), forward_seconds)


def _shortened(outline: Family, num_layers: int, device: torch.device) -> Family:
    """The first layers with weights that are small and random: what they are does not matter."""
    family = copy.copy(outline)
    family.network = copy.deepcopy(outline.network)
    del family.network.layers[num_layers:]
    family.network.num_layers = num_layers
    family.network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in [*family.network.parameters(), *family.network.buffers()]:
            tensor.normal_(0.0, 0.02, generator=generator) if tensor.ndim > 1 else tensor.fill_(1.0)
    family.network.eval()
    return family


def _peak(run: Callable[[], None], device: torch.device) -> float:
    """Bytes that exist at most while `run` runs, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    with LiveBytes() as count:
        run()
    return float(count.peak)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
