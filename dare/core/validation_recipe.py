"""Held-out loss while training: on which rows, how often, and what follows from it. Schema only; no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from dare.core.options import Options


class ValidationRecipe(Options):
    """The negative ELBO per token of held-out rows, on the same masks every time."""

    every: int | None = Field(None, ge=1, description="steps between validations; null: only at start and end")
    path: str | None = Field(None, description="held-out rows, read as data is; default: the task's held-out problems")
    split: str = Field("validation", description="path: which split of a data set that has several")
    num_rows: int = Field(64, ge=1, description="rows, the first ones")
    num_masks: int = Field(8, ge=1, description="masks per row, spread evenly over all counts of masked tokens")
    patience: int | None = Field(
        None, ge=1, description="stop training after so many validations without an improvement; null: never"
    )
    min_delta: float = Field(0.0, ge=0.0, description="nats per token by which the loss must fall to have improved")
    is_best_kept: bool = Field(False, description="keep the checkpoint of the lowest loss as checkpoints/best")

    @model_validator(mode="after")
    def _check(self) -> ValidationRecipe:
        if self.patience is not None and self.every is None:
            raise ValueError("patience counts validations between start and end; set validation.every")
        return self
