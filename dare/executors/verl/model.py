"""What verl calls a model config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dare.core.recipe import Recipe
from dare.executors.choices import VerlOptions

MODEL_TYPE = "diffusion_lm"


@dataclass
class DiffusionModel:
    """The recipe that says which model it is, and the switches that verl reads."""

    recipe: Recipe
    tokenizer: Any
    options: VerlOptions
    needs_reference: bool
    critic_lr: float | None
    model_type: str = MODEL_TYPE
    use_remove_padding: bool = False
    use_fused_kernels: bool = False
    use_liger: bool = False
    enable_gradient_checkpointing: bool = False
    enable_activation_offload: bool = False
    lora_rank: int = 0
    trust_remote_code: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """As verl's configs have it."""
        return vars(self).get(name, default)
