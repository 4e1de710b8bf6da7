"""Where the log-probs of the frozen reference policy come from. Schema only; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dare.core.options import Options


class ReferenceRecipe(Options):
    """Of algorithms that compare with the policy as it was before training."""

    mode: Literal["live", "stored"] = Field(
        "live",
        description="live: a frozen copy of the model scores every batch; stored: offline, the model scores all "
        "batches before the first step, so that no copy is held in memory",
    )
    path: str | None = Field(
        None, description="stored: the file, which later runs of the same model and data use again; default: in the run"
    )

    @model_validator(mode="after")
    def _check(self) -> ReferenceRecipe:
        if self.path is not None and self.mode == "live":
            raise ValueError("reference.path needs reference.mode: stored; set it or remove the path")
        return self
