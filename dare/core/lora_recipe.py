"""Low-rank adapters: how large they are and which matrices get one. Schema only; no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from dare.core.options import Options

AdapterInit = Literal["kaiming", "gaussian"]


class LoraRecipe(Options):
    """Train `W + scale * B A` with W frozen (Hu et al. 2022); scale is alpha / rank, or alpha / sqrt(rank).

    B starts at 0, so an untrained adapter is the base model exactly.
    """

    rank: int = Field(16, ge=1, description="rows of A, columns of B")
    alpha: float = Field(32.0, gt=0, description="numerator of the scale")
    rslora: bool = Field(False, description="scale alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="matrices by the end of their official names, such as [q_proj, v_proj]; all-linear: all but "
        "embedding, head and routers, experts included",
    )
    init: AdapterInit = Field("kaiming", description="of A: uniform as a linear layer's (peft's default), or normal")
    quantize_base: Literal["8bit", "4bit"] | None = Field(
        None, description="store the layers' frozen matrices in 8 or 4 bits (QLoRA); needs bitsandbytes"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="must be 0; see docs/lora.md")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            return (value,)
        if isinstance(value, list | tuple) and not value:
            raise ValueError("an adapter needs target modules; name some, or use all-linear")
        return value

    @field_validator("dropout")
    @classmethod
    def _refuse_dropout(cls, value: float) -> float:
        if value > 0:
            raise ValueError(
                "dropout is refused: the passes of an update must be the same function, whatever the micro-batch; "
                "set 0 and regularise with a smaller rank or optimizer.weight_decay"
            )
        return value

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
