"""What preference optimisation shares: margins of ELBOs over the reference, pairs, metrics."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from dare.algorithms.base import Algorithm, RowKind
from dare.core.lazy import torch
from dare.core.options import Options
from dare.core.rng import Key
from dare.core.types import Loss, Metric, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce
from dare.objectives.preference import Link, pair_loss

if TYPE_CHECKING:
    from torch import Tensor

Beta = Annotated[float, Field(gt=0.0, description="how fast the loss reacts to a margin, per nat")]
NumViews = Annotated[int, Field(ge=1, description="masks per completion, each with a noise level of its own")]
Plan = Annotated[
    Literal["exact_count", "bernoulli"],
    Field(description="how many tokens a view masks: evenly spread counts, or each with probability t"),
]


class PreferenceOptions(Options):
    """Every algorithm gives the first two their own defaults."""

    beta: Beta
    views_per_sample: NumViews
    sides: Literal["independent", "shared"] = Field(
        "independent", description="random numbers of the chosen and the rejected completion of a prompt"
    )
    draws: Literal["visit", "row"] = Field(
        "visit", description="new masks whenever a row comes up, or the same ones for it in every epoch"
    )
    norm: Literal["none", "length"] = Field(
        "none", description="what log-likelihoods are divided by: nothing, or the completion's scored tokens"
    )


class PlanOptions(Options):
    """How the ELBO is estimated. Every algorithm gives the plan its own default."""

    plan: Plan
    counts: Literal["stratified", "rounded"] = Field(
        "stratified", description="exact_count: integer offsets, or those of public code, rounded half to even (biased)"
    )


def elbo_views(samples: Samples, key: Key, options: PlanOptions, num_views: int) -> Views:
    """Views whose weighted sum estimates the ELBO of each sample."""
    if options.plan == "bernoulli":
        return corrupt.bernoulli(samples, key, num_views=num_views)
    return corrupt.exact_count(samples, key, num_views=num_views, is_rounded=options.counts == "rounded")


PreferenceT = TypeVar("PreferenceT", bound=PreferenceOptions)


class PreferenceAlgorithm(Algorithm[PreferenceT]):
    """Trains on margins: log-likelihood under the policy minus that under the reference, on the same views."""

    kind: ClassVar[Literal["online", "offline"]] = "offline"
    row_kind: ClassVar[RowKind] = "pairs"

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_old(self) -> bool:
        return False

    @property
    def has_fixed_views(self) -> bool:
        return self.options.draws == "row"

    def corrupt(self, samples: Samples, key: Key) -> Views:
        if self.options.sides == "shared":
            samples = dataclasses.replace(samples, sample_id_B=pair_ids(samples))
        return self.draw(samples, key)

    @abstractmethod
    def draw(self, samples: Samples, key: Key) -> Views:
        """The views of every completion, keyed by its sample id."""

    def elbos(self, logp_RS: Tensor, views: Views, samples: Samples) -> Tensor:
        """float64 [B]: the estimated log-likelihood of each completion, divided as `norm` says."""
        elbo_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)
        if self.options.norm == "length":
            elbo_B = reduce.divide(elbo_B, samples.is_scored_BS.sum(-1))
        return elbo_B

    def margins(
        self, logp_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> tuple[Tensor, Tensor]:
        """float64 [B] each: ELBOs under the policy, and their margins over the reference's."""
        if reference_RS is None:
            raise ValueError("preference losses compare with a reference policy")
        elbo_B = self.elbos(logp_RS, views, samples)
        return elbo_B, elbo_B - self.elbos(reference_RS, views, samples)


class PairOptions(PreferenceOptions):
    link: Link = Field("logistic", description="logistic (DPO), squared (IPO) or hinge (SLiC)")
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="logistic: assumed share of swapped labels")
    sft_weight: float = Field(0.0, ge=0.0, description="weight of -ELBO / L of the chosen completions")

    @model_validator(mode="after")
    def _check(self) -> PairOptions:
        if self.label_smoothing and self.link != "logistic":
            raise ValueError(f"label_smoothing needs link: logistic, got {self.link}; remove one of them")
        return self


PairT = TypeVar("PairT", bound=PairOptions)


class PairAlgorithm(PreferenceAlgorithm[PairT]):
    """The mean over pairs of a loss of the score: margin of the chosen minus margin of the rejected completion."""

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        options = self.options
        elbo_B, margin_B = self.margins(logp_RS, reference_RS, views, samples)
        chosen_P, rejected_P = pair_rows(samples)
        score_P = margin_B[chosen_P] - margin_B[rejected_P]
        value = reduce.mean(pair_loss(options.link, score_P, options.beta, options.label_smoothing))
        metrics = {
            "reward_accuracy": reduce.metric(is_ranked(score_P)),
            "reward_margin": reduce.metric(options.beta * score_P),
            **side_metrics(elbo_B, options.beta * margin_B, chosen_P, rejected_P),
        }
        if options.sft_weight > 0:
            length_P = samples.is_scored_BS.sum(-1)[chosen_P] if options.norm == "none" else torch.ones(len(chosen_P))
            sft = reduce.mean(reduce.divide(-elbo_B[chosen_P], length_P))
            metrics["sft_loss"] = reduce.metric(sft)
            value = value + options.sft_weight * sft
        return Loss(value, metrics)


class ElboPairOptions(PairOptions, PlanOptions):
    """Every algorithm gives beta, the number of views and the plan its own defaults."""


ElboPairT = TypeVar("ElboPairT", bound=ElboPairOptions)


class ElboPairAlgorithm(PairAlgorithm[ElboPairT]):
    """A pair loss on ELBOs."""

    def draw(self, samples: Samples, key: Key) -> Views:
        return elbo_views(samples, key, self.options, self.options.views_per_sample)


def is_ranked(score: Tensor) -> Tensor:
    """1 where the score is positive, 1/2 where it is 0, else 0."""
    return (score > 0).double() + 0.5 * (score == 0).double()


def side_metrics(elbo_B: Tensor, reward_B: Tensor, good: Tensor, bad: Tensor) -> dict[str, Metric]:
    """Means over the chosen and over the rejected completions (row indices, or masks) of ELBOs and of rewards."""
    return {
        "chosen_elbo": reduce.metric(elbo_B[good]),
        "rejected_elbo": reduce.metric(elbo_B[bad]),
        "chosen_reward": reduce.metric(reward_B[good]),
        "rejected_reward": reduce.metric(reward_B[bad]),
    }


def is_preferred(samples: Samples) -> Tensor:
    """bool [B]: the rows whose reward says that they are the better ones."""
    if samples.reward_B is None:
        raise ValueError("these samples do not say which completions are preferred")
    return samples.reward_B > 0.5


def pair_rows(samples: Samples) -> tuple[Tensor, Tensor]:
    """int64 [P] each: the rows of the chosen and the rejected completion of every pair (a group), by group."""
    is_good_B = is_preferred(samples)
    rows = [side.nonzero()[:, 0] for side in (is_good_B, ~is_good_B)]
    chosen_P, rejected_P = (side[samples.group_B[side].argsort(stable=True)] for side in rows)
    if not torch.equal(samples.group_B[chosen_P], samples.group_B[rejected_P]):
        raise ValueError("every group must be one chosen and one rejected completion")
    return chosen_P, rejected_P


def pair_ids(samples: Samples) -> Tensor:
    """int64 [B]: the sample id of the chosen completion of each row's pair."""
    chosen_P, rejected_P = pair_rows(samples)
    ids_B = samples.sample_id_B.clone()
    ids_B[rejected_P] = samples.sample_id_B[chosen_P]
    return ids_B
