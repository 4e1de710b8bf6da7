"""From a task's reward and a completion's length to the parts that are trained, and their weighted sum."""

from __future__ import annotations

from collections.abc import Iterable

from dare.core.errors import unknown_name
from dare.core.reward_recipe import OverlongRecipe, RewardRecipe
from dare.core.text import Reward


class RewardMix:
    """The reward section of a recipe, applied. `gen_length` (tokens) is what brevity is measured against."""

    def __init__(self, recipe: RewardRecipe, gen_length: int) -> None:
        self.recipe = recipe
        self.weights = dict(recipe.weights)
        self._gen_length = gen_length

    @property
    def is_plain(self) -> bool:
        """Whether the trained reward is the task's own."""
        return self.weights == {"value": 1.0}

    def parts(self, reward: Reward, num_tokens: int, *, is_finished: bool) -> dict[str, float]:
        """Every part of one completion by name: the task's, then those of its length (which win over equal names).

        num_tokens   through the first EOS
        is_finished  whether there is one
        """
        found = {**reward.parts, "value": reward.value}
        found["finished"] = float(is_finished)
        found["brevity"] = 1.0 - num_tokens / self._gen_length
        if self.recipe.overlong is not None:
            found["overlong"] = overlong_penalty(num_tokens, self.recipe.overlong)
        return found

    def trained(self, reward: Reward, num_tokens: int, *, is_finished: bool) -> dict[str, float]:
        """The parts that have a weight. A part that the task left out of this reward is 0."""
        found = self.parts(reward, num_tokens, is_finished=is_finished)
        return {name: found.get(name, 0.0) for name in self.weights}

    def total(self, parts: dict[str, float]) -> float:
        """The weighted sum of `trained` parts."""
        return sum(weight * parts[name] for name, weight in self.weights.items())

    def check_names(self, examples: Iterable[Reward]) -> None:
        """Raise DareError for a weight whose part no example has."""
        known = {name for reward in examples for name in self.parts(reward, 0, is_finished=True)}
        for name in self.weights:
            if name not in known:
                raise unknown_name("reward part", name, sorted(known), where="reward.weights")


def overlong_penalty(num_tokens: int, lengths: OverlongRecipe) -> float:
    """0 up to limit - margin tokens, then linear, -1 from the limit on (DAPO, equation 13)."""
    excess = num_tokens - (lengths.limit - lengths.margin)
    return -min(max(excess / lengths.margin, 0.0), 1.0)
