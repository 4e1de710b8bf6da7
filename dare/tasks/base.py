"""What a task is: problems as text, and a scorer of text. No torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from pydantic import Field

from dare.core.errors import NonFiniteError, unknown_name
from dare.core.options import Options
from dare.core.text import Prompt, Reward

SPLITS = ("train", "eval")


class TaskOptions(Options):
    """What every task with generated problems has; a task adds its difficulty."""

    train_size: int = Field(10_000, ge=1, description="training problems; they follow the run's seed")
    eval_size: int = Field(512, ge=1, description="held-out problems; none of them occurs in training")
    eval_seed: int = Field(0, ge=0, description="held-out problems are the same for every seed of a run")


OptionsT = TypeVar("OptionsT", bound=TaskOptions)


class Task(ABC, Generic[OptionsT]):
    """A plug-in: one file, one row of the table in `core.registry`.

    Splits are "train" and "eval". A held-out problem never occurs in "train", whatever the seed.
    """

    Config: ClassVar[type[Options]]
    solved_name: ClassVar[str]  # what `Reward.is_solved` means, for tables and reports

    def __init__(self, options: OptionsT, seed: int) -> None:
        self.options = options
        self.seed = seed

    def size(self, split: str) -> int:
        """Number of problems. Raises DareError for an unknown split."""
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return self.options.train_size if split == "train" else self.options.eval_size

    @abstractmethod
    def prompt(self, split: str, index: int) -> Prompt:
        """Problem `index` of a split: a pure function of (options, seed, split, index).

        `uid` is "name/split/index"; `answer` a completion that solves it, if the task knows one.
        """

    @abstractmethod
    def reward(self, prompt: Prompt, completion: str) -> Reward:
        """Score any text in bounded time; never raises.

        `value`, in [0, 1], is for training; `is_solved` for evaluation, where partial credit counts nothing.
        """

    def judge(self, prompt: Prompt, completion: str) -> Reward:
        """`reward`, checked. Raises NonFiniteError naming the problem if it or a part of it is NaN or infinite."""
        reward = self.reward(prompt, completion)
        for name, number in (("value", reward.value), *reward.parts.items()):
            if not math.isfinite(number):
                raise NonFiniteError(
                    f"a reward of {type(self).__name__} is not finite",
                    where=f"{prompt.uid}, {name}",
                    got=number,
                    fix="correct the task's reward; the last checkpoint is intact",
                )
        return reward

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """All characters of prompts and answers: the vocabulary of a model made from scratch."""
