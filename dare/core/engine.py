"""The seven verbs between a training loop and whatever executes it: one process, or many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import Canvas, Samples, TraceBatch, Views

if TYPE_CHECKING:
    from torch import Tensor


Progress = Callable[[int, int], None]


class Engine(Protocol):
    """Loops drive this and never know what is behind it. All tensors cross on the CPU of the driver."""

    @property
    def spec(self) -> FamilySpec:
        """What the family is."""
        ...

    def canvas(self, prompts: list[list[int]], completions: list[list[int]], block_length: int | None) -> Canvas:
        """Lay out token ids the way the family does (a pure function; no verb)."""
        ...

    def generate(
        self,
        prompts: list[list[int]],
        decode: Decode,
        key: Key,
        sample_ids: list[int],
        on_progress: Progress | None = None,
    ) -> TraceBatch:
        """One completion per row, with the weights of the last `publish`.

        on_progress  called with (positions settled, all completion positions) as they are
        """
        ...

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False) -> Tensor:
        """float32 [R, S] log-probs without a graph; 0 where nothing is scored."""
        ...

    def accumulate(self, views: Views, samples: Samples, grad_RS: Tensor) -> Tensor:
        """Add d sum(grad * logp) / d weights to the gradient; returns the log-probs of this pass.

        Views whose gradient is 0 everywhere are not run; their log-probs come back as NaN.
        """
        ...

    def step(self) -> dict[str, float]:
        """One optimizer step on the accumulated gradient, which it clears: gradient norm, learning rate, and how
        evenly the experts of a mixture were used since the last step.

        Raises NonFiniteError before anything is changed if the gradient is not finite.
        """
        ...

    def publish(self) -> None:
        """Make `generate` use the current weights."""
        ...

    def save(self, directory: Path) -> None:
        """Write the weights in HF layout and the optimizer state into an existing directory."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        ...
