"""What a completion is trained towards: weights of reward parts, shaping by length, which groups count. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from dare.core.options import Options


class OverlongRecipe(Options):
    """The part `overlong`: 0 up to limit - margin tokens, then falling to -1 at the limit (DAPO, Yu et al. 2025)."""

    limit: int = Field(ge=1, description="tokens at which the whole penalty of -1 is reached")
    margin: int = Field(ge=1, description="tokens before the limit over which the penalty grows")

    @model_validator(mode="after")
    def _check(self) -> OverlongRecipe:
        if self.margin > self.limit:
            raise ValueError(f"margin {self.margin} is above limit {self.limit}; lower margin")
        return self


class RewardRecipe(Options):
    """The trained reward, a weighted sum of parts; evaluation and the logged `reward` stay the task's own.

    Parts: `value` (the task's reward), whatever parts the task names (`format`, ...), and of the completion's tokens
    `finished` (1 if it ends with EOS, else 0), `brevity` (1 - tokens / gen_length) and `overlong`.
    """

    weights: dict[str, float] = Field({"value": 1.0}, min_length=1, description="weight of each part that is trained")
    combine: Literal["sum", "decoupled"] = Field(
        "sum",
        description="sum: advantages of the weighted sum; decoupled: the weighted sum of each part's own advantages, "
        "so that a part with a large spread does not drown the others (GDPO of Liu et al. 2026)",
    )
    overlong: OverlongRecipe | None = Field(None, description="lengths of the part overlong; needed if it has a weight")

    @model_validator(mode="after")
    def _check(self) -> RewardRecipe:
        wrong = [name for name, weight in self.weights.items() if weight == 0.0 or not math.isfinite(weight)]
        if wrong:
            raise ValueError(f"the weight of {wrong[0]} is {self.weights[wrong[0]]}; remove it or give it a weight")
        if ("overlong" in self.weights) != (self.overlong is not None):
            raise ValueError(
                "the part overlong needs both a weight and its lengths; give "
                "weights: {value: 1, overlong: 1} and overlong: {limit: 256, margin: 64}, or neither"
            )
        return self


class GroupRecipe(Options):
    """Which groups of completions are trained on (dynamic sampling, DAPO); the others do not enter denominators."""

    drop_equal: bool = Field(False, description="leave out groups whose completions all have the same reward")
    min_solve_rate: float = Field(0.0, ge=0.0, le=1.0, description="leave out groups below this solve rate")
    max_solve_rate: float = Field(1.0, ge=0.0, le=1.0, description="leave out groups above this solve rate")
    oversample: int = Field(
        1, ge=1, description="roll out this many times prompts_per_step prompts; the first prompts_per_step kept count"
    )

    @model_validator(mode="after")
    def _check(self) -> GroupRecipe:
        if self.min_solve_rate > self.max_solve_rate:
            raise ValueError(
                f"min_solve_rate {self.min_solve_rate} is above max_solve_rate {self.max_solve_rate}; exchange them"
            )
        if self.oversample > 1 and not self.is_filtering:
            raise ValueError("oversample rolls out more prompts than are trained on; set drop_equal or the solve rates")
        return self

    @property
    def is_filtering(self) -> bool:
        return self.drop_equal or self.min_solve_rate > 0.0 or self.max_solve_rate < 1.0
