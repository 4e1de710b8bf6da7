"""Where a run executes: the rows of the executors table, with their options. No torch, Ray or verl before `create`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.options import Options
from dare.core.recipe import Recipe


class LocalOptions(Options):
    pass


class Local:
    """One process, on the CPU or one GPU."""

    Config = LocalOptions

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    def check(self, recipe: Recipe) -> None:
        """Every recipe runs here."""

    def create(self, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None) -> Engine:
        """The engine of a recipe: its checkpoint loaded, or its new model with keyed initial weights."""
        if recipe.rollout.is_remote:
            from dare.executors.remote import RemoteEngine

            return RemoteEngine.create(recipe, tokenizer, needs_reference=needs_reference, critic_lr=critic_lr)
        from dare.executors.local import LocalEngine

        return LocalEngine.create(recipe, tokenizer, needs_reference=needs_reference, critic_lr=critic_lr)


class VerlOptions(Options):
    num_workers: int = Field(1, ge=1, description="processes, one GPU each where there are GPUs")
    fsdp_size: int | None = Field(
        None, ge=1, description="processes that share one copy of the weights (HSDP); default: all of them"
    )
    in_process: bool = Field(False, description="the only worker lives in this process, without Ray; for debugging")
    address: str | None = Field(None, description="a running Ray cluster, for example auto; default: start one here")
    reshard_after_forward: bool = Field(True, description="free gathered layers between forward and backward")
    cpu_offload: bool = Field(False, description="keep shards, gradients and optimizer state in host memory (FSDP2)")
    timeout_s: float = Field(1800.0, gt=0.0, description="longest that a worker may take for one call, seconds")


class Verl:
    """Ray workers of verl with FSDP2-sharded weights, driven by the same loops."""

    Config = VerlOptions

    def __init__(self, options: VerlOptions) -> None:
        self.options = options

    def check(self, recipe: Recipe) -> None:
        """Raises DareError for what cannot be cut into shards: blocks of quantised weights or moments."""
        is_quantized = recipe.lora is not None and recipe.lora.quantize_base is not None
        wanted = {"lora.quantize_base": is_quantized, "optimizer.moments": recipe.optimizer.moments == "8bit"}
        for key in (key for key, is_wanted in wanted.items() if is_wanted):
            raise DareError(
                f"the verl executor has no {key}", where=key, fix=f"remove {key}, or use executor=local for it"
            )

    def create(self, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None) -> Engine:
        """As `Local.create`. Raises DareError if verl is missing or the cluster has too few processes."""
        from dare.executors.verl.driver import VerlEngine

        return VerlEngine.create(recipe, tokenizer, self.options, needs_reference=needs_reference, critic_lr=critic_lr)
