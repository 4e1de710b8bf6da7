"""The diffusion engine that verl's `TrainingWorker` builds: our networks and our numerics on verl's device mesh.

A `LocalEngine` does all the arithmetic, on networks that were sharded before its optimizers took their parameters.
What is left for this class is what several processes add: equal numbers of collective passes, sums over processes,
weights gathered for a rollout, and checkpoints that any number of processes can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from verl.workers.engine import EngineRegistry, FSDPEngine

from dare.core.decode import Decode
from dare.core.engine import Role
from dare.core.rng import Key
from dare.core.types import AuxLoss, TraceBatch
from dare.executors.local import LocalEngine, read_tensors
from dare.executors.verl import shards
from dare.executors.verl.model import MODEL_TYPE, DiffusionModel
from dare.executors.verl.split import Shard
from dare.families.build import DTYPES, build_family
from dare.families.layers.moe import ExpertLoad
from dare.families.weights import filled_family, read_weights, save_family
from dare.training.optim import Optimizer


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "npu", "cpu"])
class DiffusionFSDPEngine(FSDPEngine):  # type: ignore[misc]
    """Verbs of `core.engine.Engine`, for one process among several."""

    local: LocalEngine

    def initialize(self) -> None:
        """Build, shard and hand over to the optimizers. Every process loads the checkpoint on its CPU."""
        model: DiffusionModel = self.model_config
        recipe, options = model.recipe, model.options
        on_cpu = recipe.model.model_copy(update={"device": "cpu"})
        self.shard = shards.sharder(
            self.device_mesh,
            DTYPES[recipe.model.dtype],
            reshard_after_forward=options.reshard_after_forward,
            cpu_offload=options.cpu_offload,
        )
        self.local = LocalEngine(
            recipe,
            build_family(on_cpu, model.tokenizer, Key(recipe.seed), recipe.lora),
            num_updates=recipe.train.steps * recipe.train.updates_per_rollout,
            needs_reference=model.needs_reference,
            critic_lr=model.critic_lr,
            prepare=self.shard,
        )
        self.local.gradient_factor = float(dist.get_world_size())  # FSDP divides the sum over processes by it
        self.module = self.local.family.network
        self.optimizer = self.local.optimizer.adam
        self.lr_scheduler = None  # the rate is a function of the step

    def generate(
        self,
        prompts: list[list[int]],
        decode: Decode,
        key: Key,
        sample_ids: list[int],
        has_drafts: bool,
        branching: tuple[int, ...],
        num_alternatives: int,
    ) -> TraceBatch | None:
        """This process's completions; None if it has no prompt."""
        frees = self.model_config.options.reshard_after_forward
        with shards.gathered(self.module, reshard_after_forward=frees):
            if not prompts:
                return None
            return self.local.generate(
                prompts,
                decode,
                key,
                sample_ids,
                has_drafts=has_drafts,
                branching=branching,
                num_alternatives=num_alternatives,
            )

    def score(self, shard: Shard, is_reference: bool, role: Role) -> Tensor:
        """float32 [R, S]: of this process's views."""
        found = self.local.score_parts(shard.views, shard.canvas, shard.parts, is_reference=is_reference, role=role)
        for network in self.local.networks():
            shards.release(network)
        return found

    def predict(self, shard: Shard) -> Tensor:
        """int64 [R, S]: of this process's views."""
        found = self.local.predict_parts(shard.views, shard.canvas, shard.parts)
        for network in self.local.networks():
            shards.release(network)
        return found

    def accumulate(self, shard: Shard, grad_RS: Tensor, auxiliary: AuxLoss | None, role: Role) -> tuple[Tensor, Tensor]:
        """The scores of this process's views, and the values of its auxiliary terms."""
        found = self.local.replay_parts(shard.views, shard.canvas, grad_RS, shard.parts, auxiliary=auxiliary, role=role)
        return found, torch.zeros(0) if auxiliary is None else auxiliary.value_A

    def step(self, role: Role) -> dict[str, float]:
        """One optimizer step of all processes together."""
        if role == "critic" and self.local.critic is not None:
            head = self.local.critic.head  # whole in every process, and each has the gradient of its own views
            head.grad = torch.zeros_like(head) if head.grad is None else head.grad
            dist.all_reduce(head.grad)
            head.grad /= self.local.gradient_factor
        if role == "policy":
            loads: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(loads, self.local.load_of_step)
            self.local.load_of_step = ExpertLoad.joined(loads)
        return self.local.step(role)

    def publish(self, version: int) -> None:
        """What `generate` reads is what was trained; only the number changes."""
        self.local.weights_version = version

    def save(self, directory: Path) -> None:
        """One checkpoint of whole tensors, the one that a single process would write; the first process writes it."""
        is_first = dist.get_rank() == 0
        family, stored = self.local.family, DTYPES[self.model_config.recipe.model.dtype]
        own = self.local.optimizer.parameters if family.adapter is not None else _tensors(family.network)
        weights = shards.whole(own, is_kept=is_first)
        optimizer = shards.whole(self.local.optimizer.state(), is_kept=is_first)
        if stored != torch.float32 and is_first:  # then the weights alone would not do
            optimizer |= {f"master/{name}": weights[name] for name in self.local.optimizer.masters}
        files = {"optimizer": optimizer}
        if self.local.critic is not None:
            files["critic"] = shards.whole(self.local.critic.state(), is_kept=is_first)
            files["critic_optimizer"] = shards.whole(self.local.critic_optimizer.state(), is_kept=is_first)
        if is_first:
            save_family(filled_family(family, weights), directory, stored)
            for name, tensors in files.items():
                save_file(tensors, directory / "trainer" / f"{name}.safetensors")
        dist.barrier()

    def load(self, directory: Path) -> None:
        """Read what `save` of any number of processes wrote."""
        optimizer = read_tensors(directory, "optimizer")
        loaded = read_weights(self.local.family, directory)
        masters = {name.removeprefix("master/"): t for name, t in optimizer.items() if name.startswith("master/")}
        self._restore(self.local.optimizer, {**loaded, **masters}, optimizer)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in loaded:
                    buffer.copy_(loaded[name])
        if self.local.critic is not None:
            weights = read_tensors(directory, "critic")
            self._restore(self.local.critic_optimizer, weights, read_tensors(directory, "critic_optimizer"))

    def _restore(self, optimizer: Optimizer, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """This process's shards of whole weights and moments."""
        with torch.no_grad():
            for name, parameter in optimizer.parameters.items():
                parameter.copy_(shards.like(weights[name], parameter))
        mine = {}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            if kind != "master":
                mine[key] = shards.like(tensor, optimizer.parameters[name]) if name else tensor
        optimizer.load_state(mine)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names of the modules, which may differ from those of a checkpoint."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
