"""Low-rank adapters in a network (Hu et al. 2022): which matrices get one, how they start, on, off and merged.

Linear layers are wrapped by `peft`, stacked experts by `layers.expert_lora`; to the outside both are pairs (A, B) under
official module names, one per expert, which is how `peft` names them on the published models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dare.core.errors import DareError, unknown_name
from dare.core.lora_recipe import LoraRecipe
from dare.core.rng import Key
from dare.families.layers.expert_lora import AdaptedExperts
from dare.families.layers.moe import Experts
from dare.families.layers.quantized import Bits, QuantizedLinear, require_bitsandbytes

if TYPE_CHECKING:
    from dare.families.base import Family
from dare.families.network import Network

_NAME = "default"  # peft keeps several adapters apart by name; here is one


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter belongs to: folder or hub id, and the digest of its weights if it is known."""

    path: str
    digest: str | None


class Pair(NamedTuple):
    """One adapted matrix under its official module name; the tensors are (views of) the trained parameters."""

    name: str
    weight_OI: Tensor
    a_RI: Tensor
    b_OR: Tensor


class _Place(NamedTuple):
    """Where the matrix of an official module name lives: a linear layer, or a stack of experts."""

    module: str
    stack: str | None = None


class Adapter:
    """The adapter of one network; without `peft` in its interface.

    recipe  rank, scale and targets
    names   official names of all adapted modules, in the network's order
    base    what it was put on; None for a model that is in no checkpoint
    """

    def __init__(self, network: Network, recipe: LoraRecipe, names: Iterable[str], base: Base | None = None) -> None:
        """Wrap the modules and freeze everything else. A and B are unset: `reset` or `load` gives them values.

        Raises DareError for a name that cannot be adapted, or some but not all experts of a layer.
        """
        self.network = network
        self.recipe = recipe
        self.base = base
        places = _places(network)
        wanted = set(names)
        unknown = sorted(wanted - places.keys())
        if unknown:
            raise DareError(
                "the adapter has matrices for modules that this model does not have, or that take no adapter",
                got=f"{len(unknown)}: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}",
                fix="use the adapter with the model that it was trained on",
            )
        self.names = [name for name in places if name in wanted]
        chosen = {places[name] for name in self.names}
        halves = [name for name, place in places.items() if place in chosen and name not in wanted]
        if halves:
            raise DareError(
                "all experts of a layer share one adapter, so it cannot leave some out", got=f"none for {halves[0]}"
            )
        network.requires_grad_(False)
        if recipe.quantize_base is not None:
            _quantize(network, places.values(), recipe.quantize_base)
        _wrap_linear(network, [place.module for place in chosen if place.stack is None], recipe)
        _wrap_experts(network, chosen, recipe)
        self.layers: list[tuple[str, Any]] = [
            (path, network.get_submodule(path)) for path in sorted({place.module for place in chosen})
        ]

    def pairs(self) -> Iterator[Pair]:
        """Every adapted matrix."""
        for path, layer in self.layers:
            if isinstance(layer, AdaptedExperts):
                for stack in layer.lora_A:
                    weights = layer.base_layer.get_parameter(stack).unbind(0)
                    a_pairs, b_pairs = layer.lora_A[stack].unbind(0), layer.lora_B[stack].unbind(0)
                    for index, tensors in enumerate(zip(weights, a_pairs, b_pairs, strict=True)):
                        yield Pair(_expert_name(path, index, stack), *tensors)
            else:
                yield Pair(path, layer.base_layer.weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)

    def reset(self, key: Key) -> None:
        """B = 0, so the network computes what its base does; A random, each matrix from a stream named after it."""
        with torch.no_grad():
            for pair in self.pairs():
                generator = torch.Generator().manual_seed(key.fold("adapter", pair.name).python_seed())
                start_RI = torch.empty(pair.a_RI.shape, dtype=torch.float32)
                if self.recipe.init == "gaussian":
                    start_RI.normal_(0.0, 1.0 / self.recipe.rank, generator=generator)
                else:
                    bound = start_RI.shape[1] ** -0.5
                    start_RI.uniform_(-bound, bound, generator=generator)
                pair.a_RI.copy_(start_RI)
                pair.b_OR.zero_()

    def load(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take A and B of every module by its official name. Raises DareError for a missing, spare or misshapen one."""
        missing = [name for name in self.names if name not in tensors]
        spare = sorted(tensors.keys() - set(self.names))
        if missing or spare:
            got = "; ".join(f"{len(n)} {kind}, {n[0]}" for kind, n in (("missing", missing), ("spare", spare)) if n)
            raise DareError("the adapter is not that of this run", got=got, expected=f"{len(self.names)} modules")
        with torch.no_grad():
            for pair in self.pairs():
                stored = tensors[pair.name]
                for own, new in zip((pair.a_RI, pair.b_OR), stored, strict=True):
                    if own.shape != new.shape:
                        raise DareError(
                            f"the adapter does not fit the model at {pair.name}",
                            got=list(new.shape),
                            expected=list(own.shape),
                            fix="use the adapter with the model that it was trained on",
                        )
                    own.copy_(new)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the network is its base, bit for bit: the reference policy."""
        self._switch(is_on=False)
        try:
            yield
        finally:
            self._switch(is_on=True)

    def _switch(self, *, is_on: bool) -> None:
        for _, layer in self.layers:
            layer.enable_adapters(is_on)
            for side in (layer.lora_A, layer.lora_B):  # peft freezes what is off, and a shard would stay frozen
                side.requires_grad_(True)

    def target_modules(self) -> list[str]:
        """The targets as name endings, which mean the same modules to `peft`."""
        if self.recipe.target_modules == "all-linear":
            return sorted({name.rpartition(".")[2] for name in self.names})
        return sorted(self.recipe.target_modules)

    def exclude_modules(self) -> list[str]:
        """What `target_modules` would match besides: a head that is called like a matrix of the layers (LLaDA)."""
        head = _head_name(self.network)
        return [head] if head is not None and _matches(head, self.target_modules()) else []


def add_adapter(family: Family, recipe: LoraRecipe, key: Key, base: Base | None = None) -> Adapter:
    """Put a new adapter on a family, which from then on trains nothing else. Returns it, as `family.adapter`.

    Raises DareError for a target that no module of the family has.
    """
    _require_none(family)
    family.adapter = Adapter(family.network, recipe, _wanted_names(family.network, recipe), base)
    family.adapter.reset(key)
    return family.adapter


def outline_adapter(family: Family, recipe: LoraRecipe, base: Base | None = None) -> None:
    """Put an adapter without values on a family without weights.

    The base stays as it is stored, also where `recipe` quantises it. Raises DareError as `add_adapter` does.
    """
    _require_none(family)
    plain = recipe.model_copy(update={"quantize_base": None})
    family.adapter = Adapter(family.network, plain, _wanted_names(family.network, recipe), base)


def restore_adapter(
    family: Family, recipe: LoraRecipe, tensors: Mapping[str, tuple[Tensor, Tensor]], base: Base | None
) -> Adapter:
    """Put a stored adapter on the family it was trained on. Raises DareError if it does not fit."""
    _require_none(family)
    family.adapter = Adapter(family.network, recipe, tensors, base)
    family.adapter.load(tensors)
    return family.adapter


def merge_adapter(family: Family) -> int:
    """Add the family's adapter to its weights, which are all trainable again, and remove it.

    The sum is float32 and rounded once to the weights' dtype. Returns how many matrices have changed.
    """
    adapter = family.adapter
    if adapter is None:
        raise ValueError("this family has no adapter")
    if adapter.recipe.quantize_base is not None:
        raise ValueError("an adapter is merged into the base as it is stored, not into its quantised copy")
    num_changed = 0
    with torch.no_grad():
        for _, weight_OI, a_RI, b_OR in adapter.pairs():
            merged_OI = (weight_OI.float() + adapter.recipe.scale * (b_OR.float() @ a_RI.float())).to(weight_OI.dtype)
            num_changed += not torch.equal(merged_OI, weight_OI)
            weight_OI.copy_(merged_OI)
    for path, layer in adapter.layers:
        _replace(family.network, path, layer.base_layer)
    family.network.__dict__.pop("peft_config", None)  # peft's note that the network is adapted
    family.network.requires_grad_(True)
    family.adapter = None
    return num_changed


def _wanted_names(network: Network, recipe: LoraRecipe) -> list[str]:
    """Official names of the matrices that the recipe's targets mean. Raises DareError for a target without any."""
    names = list(_places(network))
    if recipe.target_modules == "all-linear":
        return names
    for target in recipe.target_modules:
        if not any(_matches(name, (target,)) for name in names):
            known = {name.rpartition(".")[2] for name in names}
            raise unknown_name("target module", target, known, where="lora.target_modules")
    return [name for name in names if _matches(name, recipe.target_modules)]


def _require_none(family: Family) -> None:
    if family.adapter is not None:
        raise ValueError("this family has an adapter already")


def _places(network: Network) -> dict[str, _Place]:
    """Every matrix that can be adapted, by official module name.

    Not the embedding; not the head, which log-probs read without calling it; not routers, whose choice of experts a
    merge could not keep bit for bit.
    """
    head = _head_name(network)
    places: dict[str, _Place] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and path != head:
            places[path] = _Place(path)
        elif isinstance(module, Experts):
            for stack, parameter in module.named_parameters():
                for index in range(len(parameter)):
                    places[_expert_name(path, index, stack)] = _Place(path, stack)
    return places


def _expert_name(path: str, index: int, stack: str) -> str:
    return f"{path}.{index}.{stack}"


def _head_name(network: Network) -> str | None:
    """The linear layer that is the head; None if the embedding is."""
    weight = network.head_weight
    heads: list[str] = [
        path for path, module in network.named_modules() if isinstance(module, nn.Linear) and module.weight is weight
    ]
    return heads[0] if heads else None


def _matches(name: str, targets: Iterable[str]) -> bool:
    """peft's rule for lists of target modules."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _wrap_linear(network: Network, paths: list[str], recipe: LoraRecipe) -> None:
    if not paths:
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=sorted(paths),
        init_lora_weights=False,
    )
    # On the meta device, so that peft's own initial values cost no time and draw from no global generator.
    inject_adapter_in_model(config, network, adapter_name=_NAME, low_cpu_mem_usage=True)
    for path in paths:
        layer: Any = network.get_submodule(path)
        weight = layer.base_layer.weight
        for part in (layer.lora_A[_NAME], layer.lora_B[_NAME]):
            part.to(network.head_weight.dtype).to_empty(device=weight.device)


def _quantize(network: Network, places: Collection[_Place], bits: Bits) -> None:
    """Put quantised copies in the place of all linear layers but the head, adapted or not."""
    stacked = [place.module for place in places if place.stack is not None]
    if stacked:
        raise DareError(
            "stacked experts, which are most of this model, cannot be quantised",
            where="lora.quantize_base",
            got=stacked[0],
            fix="remove quantize_base",
        )
    formats = require_bitsandbytes(network.head_weight.device).functional
    for place in places:
        layer: Any = network.get_submodule(place.module)
        _replace(network, place.module, QuantizedLinear(layer, bits, formats))


def _wrap_experts(network: Network, chosen: set[_Place], recipe: LoraRecipe) -> None:
    for path in {place.module for place in chosen if place.stack is not None}:
        experts = network.get_submodule(path)
        if not isinstance(experts, Experts):
            raise TypeError(f"{path} is no stack of experts")
        stacks = [place.stack for place in chosen if place.module == path and place.stack is not None]
        _replace(network, path, AdaptedExperts(experts, stacks, recipe.rank, recipe.scale))


def _replace(network: Network, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
