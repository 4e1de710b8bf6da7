"""Countdown: an expression that uses each given number once and equals the target, `2 3 7>20=` -> `(3+7)*2`.

Compact form, for models that learn from scratch in a minute: numbers ascending, each one base-36 digit, the target of
fixed width: `37C>16=` -> `7+C-3`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, model_validator

from dare.core.text import Prompt, Reward
from dare.rewards import arithmetic
from dare.tasks.base import TaskOptions
from dare.tasks.procedural import Problem, ProceduralTask
from dare.tasks.sources import Entry

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class CountdownOptions(TaskOptions):
    """Which numbers and targets, and what a wrong expression is worth."""

    min_numbers: int = Field(3, ge=2, le=16, description="fewest given numbers")
    max_numbers: int = Field(3, ge=2, le=16, description="most given numbers")
    min_value: int = Field(1, ge=1, description="smallest given number")
    max_value: int = Field(20, ge=1, le=10**6, description="largest given number")
    min_target: int = Field(1, ge=1, description="smallest target")
    max_target: int = Field(99, ge=1, le=10**9, description="largest target")
    operators: str = Field("+-*/", min_length=1, pattern=r"^[-+*/]+$", description="operators of the solutions")
    is_compact: bool = Field(False, description="every given number is one base-36 digit; needs max_value <= 35")
    format_reward: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="reward of a wrong expression that uses each number once; never counts as solved",
    )

    @model_validator(mode="after")
    def _check(self) -> CountdownOptions:
        for what in ("numbers", "value", "target"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} {low} is above max_{what} {high}; swap or change one of them")
        if self.is_compact and self.max_value >= len(_DIGITS):
            raise ValueError(f"is_compact needs max_value <= 35, got {self.max_value}; lower max_value")
        return self


class Countdown(ProceduralTask[CountdownOptions]):
    """Completions are a bare expression of + - * / and brackets: no powers, signs, spare numbers or other text.

    Parts: `format`, it is an expression; `numbers`, it uses exactly the given numbers.
    """

    Config = CountdownOptions
    name = "countdown"
    dataset = "countdown"
    solved_name: ClassVar[str] = "expression uses each number once and equals the target"

    def parameters(self) -> dict[str, Any]:
        own = {*TaskOptions.model_fields, "format_reward", "is_compact", "operators"}
        return {**self.options.model_dump(exclude=own), "operators": sorted(set(self.options.operators))}

    def pose(self, entry: Entry) -> Problem | None:
        given, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        expression = arithmetic.parse(entry["answer"])
        if expression is None:
            return None
        text, answer = f"{' '.join(map(str, given))}>{target}=", arithmetic.render(expression)
        if self.options.is_compact:
            width = len(str(self.options.max_target))
            text = f"{''.join(_DIGITS[number] for number in sorted(given))}>{target:>{width}}="
            answer = re.sub(r"[0-9]+", lambda number: _DIGITS[int(number[0])], answer)
        return Problem(text, answer, content=(tuple(sorted(given)), target))

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        metadata = prompt.meta["entry"]["metadata"]
        text = completion.strip()
        if self.options.is_compact:  # spaces keep neighbouring digits apart: two of them are not a number
            text = re.sub(r"[0-9A-Z]", lambda digit: f" {_DIGITS.index(digit[0])} ", text[: arithmetic.MAX_CHARS])
        expression = arithmetic.parse(text)
        if expression is None or arithmetic.has_negation(expression):
            return Reward(0.0, False, {"format": 0.0, "numbers": 0.0})
        has_numbers = sorted(arithmetic.numbers(expression)) == sorted(metadata["numbers"])
        is_right = has_numbers and arithmetic.value(expression) == metadata["target"]
        is_solved = is_right and self.official_score(prompt, text) == 1.0
        value = 1.0 if is_solved else self.options.format_reward * has_numbers
        return Reward(value, is_solved, {"format": 1.0, "numbers": float(has_numbers)})

    @property
    def alphabet(self) -> str:
        return (_DIGITS if self.options.is_compact else "0123456789") + "+-*/() >="
