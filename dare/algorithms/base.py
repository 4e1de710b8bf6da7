"""What an algorithm is: which views to score, and how their log-probs become a scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from dare.core.decode import Decode
from dare.core.options import Options
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Judgement, Loss, Record, Samples, Views

if TYPE_CHECKING:
    from torch import Tensor

RowKind = Literal["completions", "pairs", "labelled"]
OptionsT = TypeVar("OptionsT", bound=Options)


class Algorithm(ABC, Generic[OptionsT]):
    """A plug-in: one file, one row of the table in `core.registry`.

    It never sees a network, a tokenizer or an executor, and it never divides by anything but a denominator
    of the whole batch it is given (one optimizer step), so results do not depend on micro-batches.
    """

    Config: ClassVar[type[Options]]
    kind: ClassVar[Literal["online", "offline"]]  # trains on rollouts | on dataset rows
    row_kind: ClassVar[RowKind] = "completions"  # offline: completions to learn, pairs of them, or with good and bad
    needs_step_map: ClassVar[bool] = False
    needs: ClassVar[frozenset[Record]] = frozenset()  # what else the rollout must record
    is_linear: bool = False  # loss is linear in logp: no scoring pass before the backward
    compares_rewards: ClassVar[bool] = False  # forms its own advantages, so a reward must be one number
    normalises_advantages: ClassVar[bool] = False  # within a group, so that a factor on one changes the others
    # Attention kinds it cannot train ("full": masked models, "block_causal": block models), each with the reason.
    forbidden: ClassVar[Mapping[str, str]] = {}

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def adapted(self, spec: FamilySpec) -> Algorithm[OptionsT]:
        """This algorithm with the defaults of the family it will train; its options say what was decided."""
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads the frozen reference policy's log-probs."""
        return False

    @property
    def needs_old(self) -> bool:
        """Whether `loss` reads the old policy's log-probs of views drawn for a later inner iteration."""
        return not self.is_linear

    @property
    def reads_recorded(self) -> bool:
        """Whether the log-probs that the rollout recorded at each commit enter the loss."""
        return False

    def check_rollouts(self, decode: Decode) -> list[str]:
        """Warnings about rollouts whose likelihood is not the one trained on.

        Raises DareError for rollouts it cannot train on. No torch.
        """
        return []

    def branching(self, num_leaves: int) -> tuple[int, ...]:
        """Children of a node at each level of a rollout's trees, for groups of `num_leaves`; () = no trees."""
        return ()

    @property
    def critic_lr(self) -> float | None:
        """Learning rate of the critic; None without one."""
        return None

    @property
    def has_fixed_views(self) -> bool:
        """Offline: whether a row has the same views whenever it comes up."""
        return False

    @property
    def num_predictions(self) -> int:
        """How often `with_predictions` is called on the views of an iteration, before the first update."""
        return 0

    def block_length(self, progress: float) -> int | None:
        """Offline: the block length of a step after that share of the run; None: the recipe's."""
        return None

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """float32 [B]; offline algorithms have none."""
        raise TypeError(f"{type(self).__name__} does not train on rewards")

    @abstractmethod
    def corrupt(self, samples: Samples, key: Key) -> Views:
        """The views of every sample, in sample-major order.

        Each draw is keyed by (`key`, sample id, view, position): a sample's views do not depend on the other
        samples or on padding. `key` differs between inner iterations.
        """

    def with_predictions(self, views: Views, samples: Samples, token_RS: Tensor) -> Views:
        """The views to train on, given the policy's most likely token at each target of `views` (int64 [R, S])."""
        raise TypeError(f"{type(self).__name__} asks for no predictions")

    @abstractmethod
    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        """The loss of the whole batch.

        logp_RS       float32 [R, S] with gradient; 0 where `views.is_target_RS` is False
        old_RS        the same under the policy before this rollout's first update (no gradient); without
                      `needs_old` whatever the engine has at hand
        reference_RS  the same under the frozen reference; None unless `needs_reference`
        """

    def auxiliary(self, views: Views, samples: Samples) -> AuxLoss | None:
        """A loss on full-vocabulary logits at few positions of the views, beside `loss`; None without one."""
        return None

    def judge(self, value_RS: Tensor, views: Views, samples: Samples) -> Judgement:
        """Returns and advantages of the tokens from the critic's values (float32 [R, S], 0 where nothing is scored).

        Called once per inner iteration, before the first update; only if there is a critic.
        """
        raise TypeError(f"{type(self).__name__} has no critic")

    def value_loss(self, value_RS: Tensor, views: Views, samples: Samples) -> Loss:
        """The critic's loss of the whole batch on its values (with gradient); `samples.judgement` is filled in."""
        raise TypeError(f"{type(self).__name__} has no critic")
