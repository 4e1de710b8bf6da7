"""A task that even a random model is rewarded for, plugged in by its import path."""

from __future__ import annotations

from dare.core.rng import Key
from dare.core.text import Prompt, Reward
from dare.tasks.base import Task, TaskOptions


class EvenDigitsOptions(TaskOptions):
    num_digits: int = 3


class EvenDigits(Task[EvenDigitsOptions]):
    """Answer a number with even digits; the reward is their share of the first characters."""

    Config = EvenDigitsOptions
    solved_name = "only even digits"

    def prompt(self, split: str, index: int) -> Prompt:
        digits = Key(self.seed).fold(split, index).permutation(10)[: self.options.num_digits]
        text = "".join(map(str, digits)) + "="
        return Prompt(uid=f"even/{split}/{index}", text=text, answer="".join(str(digit // 2 * 2) for digit in digits))

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        share = sum(character in "02468" for character in completion) / max(len(completion), 1)
        return Reward(share, share == 1.0, {"even": share})

    @property
    def alphabet(self) -> str:
        return "0123456789="
