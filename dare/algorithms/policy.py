"""What the algorithms that compare policies share: their options, advantages, and the clipped loss with its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from dare.algorithms.base import Algorithm
from dare.core.options import Options
from dare.core.types import Metric, Samples
from dare.objectives import reduce
from dare.objectives.advantage import AdvantageRule, compute_advantages
from dare.objectives.kl import KLEstimator, estimate_kl
from dare.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Annotated[AdvantageRule, Field(description="how rewards of a group become advantages")]
Epsilon = Annotated[float, Field(ge=0.0, lt=1.0, description="the ratio is clipped to [1 - eps, 1 + eps_high]")]
Beta = Annotated[float, Field(ge=0.0, description="weight of the KL to the reference; 0 needs no reference")]
KL = Annotated[KLEstimator, Field(description="estimator of the KL to the reference")]


class PolicyOptions(Options):
    """Every algorithm gives the first four their own defaults."""

    advantage: Advantage
    eps: Epsilon
    beta: Beta
    kl: KL
    eps_high: float | None = Field(None, ge=0.0, description="upper clip; default: eps")
    dual_clip: float | None = Field(None, gt=1.0, description="cap of the ratio where the advantage is negative")
    score_temperature: Literal["rollout", "one"] = Field(
        "rollout",
        description="temperature of the scored log-probs: that of the rollout, so that the ratio is its own, or 1",
    )


PolicyOptionsT = TypeVar("PolicyOptionsT", bound=PolicyOptions)


class PolicyAlgorithm(Algorithm[PolicyOptionsT]):
    """An online algorithm whose loss is -clipped surrogate + beta * KL, per token or per sequence."""

    kind: ClassVar[Literal["online", "offline"]] = "online"

    @property
    def needs_reference(self) -> bool:
        return self.options.beta > 0

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        return compute_advantages(self.options.advantage, reward_B, group_B)

    def temperature(self, samples: Samples) -> float:
        """What the views' logits are divided by."""
        return samples.rollout_temperature if self.options.score_temperature == "rollout" else 1.0

    def policy_loss(
        self, log_ratio: Tensor, advantage: Tensor, is_item: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """-clipped surrogate of each item (a token or a sequence), and metrics over `is_item` (default: all)."""
        options = self.options
        eps_high = options.eps if options.eps_high is None else options.eps_high
        objective, is_clipped = clipped_surrogate(log_ratio, advantage, options.eps, eps_high, options.dual_clip)
        metrics = {
            "ratio": reduce.metric(log_ratio.detach().exp(), is_item),
            "clip_fraction": reduce.metric(is_clipped, is_item),
        }
        return -objective, metrics

    def kl_loss(self, difference: Tensor, is_item: Tensor | None = None) -> tuple[Tensor, Metric]:
        """beta * KL of each item from log policy - log reference, and the KL's mean over `is_item`."""
        kl = estimate_kl(self.options.kl, difference)
        return self.options.beta * kl, reduce.metric(kl, is_item)

    def token_loss(
        self, new: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor, is_scored: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Both terms for each token: log-probs [*, S] under the three policies, advantages [*] of the rows."""
        item, metrics = self.policy_loss(new - old, advantage.double()[:, None], is_scored)
        if reference is not None:
            kl, metrics["kl"] = self.kl_loss(new - reference, is_scored)
            item = item + kl
        return item, metrics
