"""Sharded networks: cut into FSDP2 shards, gathered for a rollout, put together for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dare.families.network import Network


def sharder(
    mesh: DeviceMesh, compute_dtype: torch.dtype, *, reshard_after_forward: bool, cpu_offload: bool
) -> Callable[[Network], None]:
    """A function that shards a network in place, a layer at a time.

    Trained shards are float32 and the optimizer's masters, frozen ones are as they are computed with. Layers compute in
    `compute_dtype` and gradients are summed in float32. What is outside the layers (embedding, last norm, head) stays
    gathered from its forward to its backward, because the head is applied outside of the network's own forward.
    """
    # Inputs are not cast: the embedding already gives the compute dtype, and rotations stay in float32.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    cut = partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)

    def shard(network: Network) -> None:
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)
        for layer in network.layers:
            cut(layer, reshard_after_forward=reshard_after_forward)
        cut(network, reshard_after_forward=False)

    return shard


@contextmanager
def gathered(network: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """All weights whole in every process inside the block, so that each may forward as often as it likes.

    `reshard_after_forward` as given to `sharder`: what holds again afterwards.
    """
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshard_after_forward and part is not network, recurse=False)
            part.reshard()


def release(network: nn.Module) -> None:
    """Drop gathered weights after a pass without a backward, so that the next one reads what the optimizer wrote."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensors: Mapping[str, Tensor], *, is_kept: bool) -> dict[str, Tensor]:
    """The tensors put together, on the CPU. Every process has to call this; the result is empty unless `is_kept`."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_kept:
            found[name] = full.detach().to("cpu", copy=True)
    return found


def like(full: Tensor, model: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, laid out as `model` is."""
    if not isinstance(model, DTensor) or full.dim() == 0:
        return full.to(model.device)
    return distribute_tensor(
        full.to(model.device_mesh.device_type), model.device_mesh, model.placements, src_data_rank=None
    )
