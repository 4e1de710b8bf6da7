"""What a recipe will need on many GPUs, from sizes and a cost model: nothing is run and no weights are loaded.

Arithmetic is counted (`families.flops`), memory of weights, gradients and moments follows from their sizes, that of
activations from the numbers that a layer keeps per token (`workload.ModelSizes`, fitted to what `calibrate` measures),
communication from the volume of FSDP2's collectives. How fast hardware is, is assumed (`Hardware`), not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field

from dare.core.options import Options
from dare.training.workload import Work

_GB = 1e9
_FLOAT32, _MOMENTS = 4, 8
_RECOMPUTED = {"none": 3.0, "selective": 3.3, "full": 4.0}  # forwards that a forward and backward are worth


class Hardware(Options):
    """Assumptions about one GPU and its links: an H100 SXM in nodes of eight, NDR InfiniBand, usual efficiencies."""

    peak_tflops: float = Field(989.0, gt=0, description="dense bfloat16, TFLOP/s")
    memory_gb: float = Field(80.0, gt=0, description="of a GPU, GB")
    reserve_gb: float = Field(6.0, ge=0, description="CUDA context, kernels, NCCL buffers and the allocator's gaps, GB")
    memory_gbps: float = Field(3350.0, gt=0, description="GPU memory, GB/s")
    node_gbps: float = Field(450.0, gt=0, description="NVLink, one direction, per GPU, GB/s")
    network_gbps: float = Field(50.0, gt=0, description="between nodes, one direction, per GPU, GB/s")
    host_gbps: float = Field(50.0, gt=0, description="between a GPU and host memory, GB/s")
    mfu: float = Field(0.4, gt=0, le=1, description="share of the peak that scoring and updates of dense models reach")
    mixture_mfu: float = Field(0.2, gt=0, le=1, description="the same for mixtures of experts")
    rollout_mfu: float = Field(0.3, gt=0, le=1, description="share of the peak that large denoising forwards reach")
    tokens_per_step: float = Field(
        2.0, ge=1, description="tokens that a denoising step commits where the unmask policy decides itself"
    )
    bandwidth_share: float = Field(0.7, gt=0, le=1, description="share of memory and link bandwidths that is reached")


@dataclass(frozen=True)
class Sharding:
    """How weights are spread, as the options of the verl executor say; `fsdp_size` None: over all GPUs."""

    num_nodes: int
    gpus_per_node: int
    fsdp_size: int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def shard_size(self) -> int:
        """GPUs that hold one copy of the weights together."""
        return self.num_gpus if self.fsdp_size is None else self.fsdp_size

    @property
    def num_copies(self) -> int:
        return self.num_gpus // self.shard_size


@dataclass(frozen=True)
class ClusterPlan:
    """Of the GPU that has most to do.

    memory       bytes by part; `peak` is the most at one time, in the update or in the rollout
    seconds      of one step by part; communication is what computation does not hide
    volume       bytes that a GPU sends in a step, by purpose
    host_memory  bytes by part in the host memory of a node
    """

    memory: dict[str, float]
    peak: float
    seconds: dict[str, float]
    volume: dict[str, float]
    host_memory: dict[str, float]
    tokens_per_second: float
    notes: list[str]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def plan_cluster(work: Work, sharding: Sharding, hardware: Hardware) -> ClusterPlan:
    """Memory, time and communication of one step."""
    memory, update_peak, rollout_peak = _memory(work, sharding)
    volume = _volume(work, sharding)
    seconds = _seconds(work, sharding, hardware, volume)
    peak = max(update_peak, rollout_peak)
    room = (hardware.memory_gb - hardware.reserve_gb) * _GB
    notes = []
    if peak > room:
        place = "update" if update_peak > rollout_peak else "rollout, which needs all weights in every GPU,"
        notes.append(f"does not fit: the {place} needs {peak / _GB:.0f} GB of {room / _GB:.0f} GB")
    if sharding.shard_size > sharding.gpus_per_node:
        notes.append("weights are sharded across nodes: every pass gathers them over the network")
    if work.num_rows % sharding.num_gpus:
        notes.append(f"{work.num_rows} rows on {sharding.num_gpus} GPUs: some wait for those that have one more")
    if work.num_views < sharding.num_gpus:
        notes.append(f"{work.num_views} views for {sharding.num_gpus} GPUs: the others only take part in communication")
    if seconds["communication"] > 0.3 * sum(seconds.values()):
        notes.append("communication is more than 30 % of a step: fewer, larger micro-batches or a smaller fsdp_size")
    return ClusterPlan(
        memory=memory,
        peak=peak,
        seconds=seconds,
        volume=volume,
        host_memory=_host_memory(work, sharding),
        tokens_per_second=work.num_scored / sum(seconds.values()),
        notes=notes,
    )


def _memory(work: Work, sharding: Sharding) -> tuple[dict[str, float], float, float]:
    """Bytes by part, and the peaks of the update and of the rollout."""
    size, model = sharding.shard_size, work.model
    frozen = (model.num_parameters - model.num_trained) * work.dtype_bytes / size
    on_gpu = 0.0 if sharding.cpu_offload else 1.0
    parts = {
        "weights": on_gpu * (frozen + model.num_trained * _FLOAT32 / size),
        "gradients": on_gpu * model.num_trained * _FLOAT32 / size,
        "optimizer": on_gpu * model.num_trained * _MOMENTS / size,
        "reference policy": on_gpu * work.num_references * model.num_parameters * work.dtype_bytes / size,
        "critic": on_gpu * work.num_critics * model.num_parameters * (2 * _FLOAT32 + _MOMENTS) / size,
        "gathered layers": 2 * model.largest_layer * work.dtype_bytes
        + model.outside_layers * work.dtype_bytes
        + model.largest_trained_layer * (work.dtype_bytes + _FLOAT32),
        "activations": work.activation_bytes,
        "rollout: whole weights": model.num_parameters * work.dtype_bytes if work.num_forwards else 0.0,
        "rollout: cache": work.cache_bytes(_rows_per_gpu(work, sharding)),
    }
    lasting = sum(parts[name] for name in ("weights", "optimizer", "reference policy", "critic"))
    if not sharding.reshard_after_forward:
        parts["gathered layers"] = (model.num_parameters + model.largest_trained_layer) * work.dtype_bytes
    update = lasting + parts["gradients"] + parts["gathered layers"] + parts["activations"]
    rollout = lasting + parts["rollout: whole weights"] + parts["rollout: cache"]
    return {name: value for name, value in parts.items() if value}, update, rollout if work.num_forwards else 0.0


def _host_memory(work: Work, sharding: Sharding) -> dict[str, float]:
    """Bytes in a node: shards that are kept there, and the checkpoint as the first worker writes it."""
    model = work.model
    trained = model.num_trained * (2 * _FLOAT32 + _MOMENTS) / sharding.shard_size * sharding.gpus_per_node
    written = model.num_trained * (_FLOAT32 + _MOMENTS)
    parts = {"offloaded shards": trained if sharding.cpu_offload else 0.0, "writing a checkpoint": float(written)}
    return {name: value for name, value in parts.items() if value}


def _rows_per_gpu(work: Work, sharding: Sharding) -> int:
    return math.ceil(work.num_rows / sharding.num_gpus)


def _num_micro_batches(work: Work, sharding: Sharding) -> int:
    """Forwards that every GPU makes for one pass over all views."""
    return math.ceil(math.ceil(work.num_views / sharding.num_gpus) / work.views_per_micro_batch)


def _volume(work: Work, sharding: Sharding) -> dict[str, float]:
    """Bytes that a GPU sends in a step: ring collectives move (n - 1) / n of a tensor, all-reduces twice that."""
    size, model = sharding.shard_size, work.model
    ring = (size - 1) / size
    whole, trained = model.num_parameters * work.dtype_bytes * ring, model.num_trained * _FLOAT32 * ring
    num = _num_micro_batches(work, sharding)
    gathers = 2 if sharding.reshard_after_forward else 1
    copies = (sharding.num_copies - 1) / sharding.num_copies
    volume = {
        "rollout: weights gathered": whole if work.num_forwards else 0.0,
        "score: weights gathered": whole * num * work.num_scorings,
        "update: weights gathered": whole * num * gathers * work.num_updates,
        "update: gradients scattered": trained * num * work.num_updates,
        "update: gradients of copies": 2 * copies * model.num_trained * _FLOAT32 / size * num * work.num_updates,
    }
    return {name: value for name, value in volume.items() if value}


def _seconds(work: Work, sharding: Sharding, hardware: Hardware, volume: dict[str, float]) -> dict[str, float]:
    """Seconds by part: within a part communication and computation run at the same time."""
    mfu = hardware.mixture_mfu if work.model.num_experts else hardware.mfu
    rate = hardware.peak_tflops * 1e12 * mfu
    num_gpus = sharding.num_gpus
    share = math.ceil(work.num_views / num_gpus) / work.num_views  # of the GPU with most views
    score = work.forward_flops * work.num_scorings * share / rate
    update = work.forward_flops * work.num_updates * _backward_factor(work) * share / rate
    sent: dict[str, float] = {}
    for name, size in volume.items():
        sent[name.partition(":")[0]] = sent.get(name.partition(":")[0], 0.0) + size / _link(sharding, hardware, name)
    trained = work.model.num_trained / sharding.shard_size
    per_number = 2 * (2 * _FLOAT32 + _MOMENTS)  # all read and written
    host = hardware.host_gbps if sharding.cpu_offload else hardware.memory_gbps
    optimizer = work.num_updates * trained * per_number / (host * hardware.bandwidth_share * _GB)
    exposed = max(0.0, sent.get("score", 0.0) - score) + max(0.0, sent.get("update", 0.0) - update)
    return {
        "rollout": _rollout_seconds(work, sharding, hardware),
        "score": score,
        "update": update,
        "communication": exposed + sent.get("rollout", 0.0),
        "optimizer": optimizer,
    }


def _backward_factor(work: Work) -> float:
    """Forwards that a replayed backward is worth; frozen weights have no gradient."""
    full = _RECOMPUTED[work.recompute]
    return full - (1.0 - work.model.num_trained / work.model.num_parameters)


def _link(sharding: Sharding, hardware: Hardware, name: str) -> float:
    """Bytes per second of the slowest link of a collective."""
    is_within = (sharding.shard_size <= sharding.gpus_per_node) and "copies" not in name
    links = hardware.node_gbps if is_within or sharding.num_nodes == 1 else hardware.network_gbps
    return links * hardware.bandwidth_share * _GB


def _rollout_seconds(work: Work, sharding: Sharding, hardware: Hardware) -> float:
    """Forwards one after another, each as long as its arithmetic or reading its weights takes, whichever is longer."""
    left, seconds = _rows_per_gpu(work, sharding), 0.0
    while left > 0 and work.num_forwards:
        rows = min(left, work.rollout_rows)
        arithmetic = rows * work.rollout_flops / (hardware.peak_tflops * 1e12 * hardware.rollout_mfu)
        read = work.model.read_bytes(rows * work.rollout_positions, work.dtype_bytes) + work.cache_bytes(rows)
        seconds += work.num_forwards * max(arithmetic, read / (hardware.memory_gbps * hardware.bandwidth_share * _GB))
        left -= rows
    return seconds
