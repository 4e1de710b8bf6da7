"""Our recipe in the words of verl's `TrainingWorker`."""

from __future__ import annotations

from typing import Any

from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

from dare.core.recipe import Recipe
from dare.executors.choices import VerlOptions
from dare.executors.verl.model import MODEL_TYPE, DiffusionModel


def worker_config(
    recipe: Recipe, tokenizer: Any, options: VerlOptions, *, needs_reference: bool, critic_lr: float | None
) -> TrainingWorkerConfig:
    """What a worker is built from. verl's own optimizer settings stay unused: ours are in the recipe."""
    return TrainingWorkerConfig(
        model_type=MODEL_TYPE,
        model_config=DiffusionModel(recipe, tokenizer, options, needs_reference, critic_lr),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            fsdp_size=-1 if options.fsdp_size is None else options.fsdp_size,
            use_torch_compile=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=recipe.train.micro_batch_views,
            infer_micro_batch_size_per_gpu=recipe.train.micro_batch_views,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=recipe.optimizer.lr),
        checkpoint_config=CheckpointConfig(),
    )
