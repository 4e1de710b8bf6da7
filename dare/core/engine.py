"""The seven verbs between a training loop and whatever executes it: one process, or many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Canvas, Samples, TraceBatch, Views

if TYPE_CHECKING:
    from torch import Tensor


Progress = Callable[[int, int], None]
Role = Literal["policy", "critic"]


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
        *,
        has_drafts: bool = False,
        branching: tuple[int, ...] = (),
    ) -> TraceBatch:
        """One completion per row, with the weights of the last `publish`.

        on_progress  called with (positions settled, all completion positions) as they are
        has_drafts   record every step's full prediction
        branching    grow trees with that many children per node at each level; adjacent rows of one prompt are the
                     leaves of a tree. () = independent completions
        """
        ...

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False, role: Role = "policy") -> Tensor:
        """float32 [R, S] without a graph: log-probs, or the critic's values; 0 where nothing is scored."""
        ...

    def predict(self, views: Views, samples: Samples) -> Tensor:
        """int64 [R, S]: the policy's most likely token at each target; 0 elsewhere. `score`'s forward, no verb."""
        ...

    def accumulate(
        self,
        views: Views,
        samples: Samples,
        grad_RS: Tensor,
        *,
        auxiliary: AuxLoss | None = None,
        role: Role = "policy",
    ) -> Tensor:
        """Add d (sum(grad * logp) + auxiliary loss) / d weights to the gradient; returns the log-probs of this pass.

        Views whose gradient is 0 everywhere and that have no auxiliary term are not run; their log-probs come back as
        NaN. `auxiliary.value_A` is filled in. For the critic, values take the place of log-probs.
        """
        ...

    def step(self, role: Role = "policy") -> dict[str, float]:
        """One optimizer step on the role's accumulated gradient, which it clears: gradient norm, learning rate, and
        how evenly the experts of a mixture were used since the policy's last step.

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

    def close(self) -> None:
        """Let go of processes and connections; the engine is not used afterwards."""
        ...
