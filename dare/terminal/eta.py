"""How long a run still takes: the steps, and the evaluations and saves that are still to come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

_RECENT = 20  # steps whose median is the cost of the next one


@dataclass(frozen=True)
class Remaining:
    """Seconds to the last step. `is_lower_bound`: something still to come has not been measured yet."""

    seconds: float
    is_lower_bound: bool


@dataclass
class Eta:
    """Measured costs, and how often each is still to be paid.

    num_steps         the step at which the run stops
    evaluate_every    steps between evaluations; None: only at the end
    save_every        steps between checkpoints; None: only at the end
    has_evaluations   False if the run has nothing to evaluate
    """

    num_steps: int
    evaluate_every: int | None
    save_every: int | None
    has_evaluations: bool = True
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _evaluations: list[float] = field(default_factory=list)
    _saves: list[float] = field(default_factory=list)

    def add_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def add_evaluation(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def add_save(self, seconds: float) -> None:
        self._saves.append(seconds)

    def remaining(self, step: int, *, is_evaluated: bool = False, is_saved: bool = False) -> Remaining | None:
        """What is left after `step` steps; None before the first step has been measured.

        is_evaluated, is_saved  whether the evaluation and the save that may be due after `step` are done already
        """
        if not self._steps:
            return None
        seconds = median(self._steps) * (self.num_steps - step)
        num_evaluations = self._num_due(self.evaluate_every, step, is_evaluated) if self.has_evaluations else 0
        is_lower_bound = False
        for costs, num in (
            (self._evaluations, num_evaluations),
            (self._saves, self._num_due(self.save_every, step, is_saved)),
        ):
            if num and costs:
                seconds += median(costs) * num
            elif num:
                is_lower_bound = True
        return Remaining(seconds, is_lower_bound)

    def _num_due(self, every: int | None, step: int, is_done: bool) -> int:
        """How often something that happens every so many steps, and at the end, still happens."""
        first = step + 1 if is_done else max(step, 1)
        if first > self.num_steps:
            return 0
        if every is None:
            return 1
        multiples = self.num_steps // every - (first - 1) // every
        return multiples + (self.num_steps % every != 0)
