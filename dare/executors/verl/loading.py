"""Sharded networks get their weights from a checkpoint a layer at a time, so no process ever holds the whole model.

Every process reads every tensor and keeps its shard; beside the shards, one layer is whole in its memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.executors.verl import shards
from dare.families.adapter_files import is_adapter
from dare.families.build import DTYPES
from dare.families.checkpoint import describe_base
from dare.families.hub import resolve_checkpoint
from dare.families.lora import Base, outline_adapter
from dare.families.network import Network
from dare.families.weights import hollow_family, open_family

_WRAPPED = "base_layer."  # what an adapter puts into the names of its base


class Loader:
    """Fills networks of one checkpoint that were cut into shards without values.

    family  of the checkpoint, on the meta device, with an adapter if the recipe has one
    """

    def __init__(self, recipe: Recipe, path: str) -> None:
        """Raises DareError for a folder that is no whole checkpoint of a known family."""
        self.dtype = DTYPES[recipe.model.dtype]
        self.family, self.stored = open_family(resolve_checkpoint(path))
        self.key = Key(recipe.seed).fold("lora")
        if recipe.lora is not None:
            self._add_adapter(recipe.lora, path)

    @classmethod
    def of(cls, recipe: Recipe) -> Loader | None:
        """The loader of a recipe; None if its model is new, or an adapter that is merged first."""
        path = recipe.model.path
        if path is None or is_adapter(resolve_checkpoint(path)):
            return None
        return cls(recipe, path)

    def fill(self, network: Network, device: torch.device) -> None:
        """Give all parameters and buffers, which `device` will hold, the values that `build_family` gives them."""
        network.to_empty(device=device)
        own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        whole = hollow_family(self.family)
        if whole.adapter is not None:
            for _, layer in whole.adapter.layers:
                for side in (layer.lora_A, layer.lora_B):
                    side.to_empty(device="cpu")
            whole.adapter.reset(self.key)
            self._take(own, {name: p for name, p in whole.network.named_parameters() if p.requires_grad})
            whole.network.requires_grad_(False)
            adapted = _loaded(whole.network, "")
            own = {name: tensor for name, tensor in own.items() if name not in adapted}
        paths = {module: f"{path}." for path, module in whole.network.named_modules()}
        layers = list(whole.network.layers)
        inside = {part for layer in layers for part in layer.modules()}
        for module in whole.network.modules():
            if module not in inside:
                module.to_empty(device="cpu", recurse=False)
        self._read({name: tensor for name, tensor in whole.network.state_dict().items() if not tensor.is_meta})
        self._take(own, _loaded(whole.network, ""))
        for layer in layers:
            layer.to_empty(device="cpu")
            self._read(layer.state_dict(prefix=paths[layer]))
            self._take(own, _loaded(layer, paths[layer]))
            layer.to_empty(device="meta")

    def _read(self, target: Mapping[str, Tensor]) -> None:
        """Overwrite tensors of a state dict, which share memory with the parameters, by the stored ones."""
        official = {name.replace(_WRAPPED, ""): tensor for name, tensor in target.items()}
        for name, tensor in self.stored.tensors(official):
            official[name].copy_(tensor)

    def _take(self, own: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """This process's parts of whole tensors, as far as they are in `own`; parameters in the recipe's precision."""
        with torch.no_grad():
            for name, tensor in whole.items():
                if name in own:
                    rounded = tensor.to(self.dtype) if isinstance(tensor, nn.Parameter) else tensor
                    own[name].copy_(shards.like(rounded, own[name]))

    def _add_adapter(self, lora: LoraRecipe, path: str) -> None:
        """The digest of the base is of all its bytes, so one process reads them for all."""
        bases: list[Base | None] = [describe_base(path, self.stored.folder) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(bases)
        outline_adapter(self.family, lora, bases[0])


def _loaded(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Parameters and buffers that have values."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {prefix + name: tensor for name, tensor in named.items() if not tensor.is_meta}
