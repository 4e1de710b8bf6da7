"""Sums and differences of several numbers, `12+17-15=` -> `14`."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, model_validator

from dare.core.text import Prompt, Reward
from dare.tasks.base import TaskOptions
from dare.tasks.procedural import Problem, ProceduralTask
from dare.tasks.sources import Entry

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,30}")


class ChainSumOptions(TaskOptions):
    """How long the sums are, and what a wrong integer is worth."""

    min_terms: int = Field(2, ge=2, le=32, description="fewest numbers in a sum")
    max_terms: int = Field(3, ge=2, le=32, description="most numbers in a sum")
    min_digits: int = Field(2, ge=1, le=12, description="fewest digits of a number")
    max_digits: int = Field(2, ge=1, le=12, description="most digits of a number")
    format_reward: float = Field(
        0.0, ge=0.0, lt=1.0, description="reward of an integer that is wrong; never counts as solved"
    )

    @model_validator(mode="after")
    def _check(self) -> ChainSumOptions:
        for what in ("terms", "digits"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} {low} is above max_{what} {high}; swap or change one of them")
        return self


class ChainSum(ProceduralTask[ChainSumOptions]):
    """Completions are the plain decimal result. Part: `format`, the completion is an integer."""

    Config = ChainSumOptions
    name = "chain_sum"
    dataset = "chain_sum"
    solved_name: ClassVar[str] = "the exact result and nothing else"

    def parameters(self) -> dict[str, Any]:
        return self.options.model_dump(exclude={*TaskOptions.model_fields, "format_reward"})

    def pose(self, entry: Entry) -> Problem:
        expression = entry["metadata"]["expression"].replace(" ", "")
        # The order of the terms does not make another problem.
        terms = tuple(sorted(re.findall(r"[-+][0-9]+", f"+{expression}")))
        return Problem(f"{expression}=", entry["answer"], content=terms)

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        text = completion.strip()
        is_integer = _INTEGER.fullmatch(text) is not None
        is_solved = is_integer and text == prompt.answer and self.official_score(prompt, text) == 1.0
        value = 1.0 if is_solved else self.options.format_reward * is_integer
        return Reward(value, is_solved, {"format": float(is_integer)})

    @property
    def alphabet(self) -> str:
        return "0123456789+-="
