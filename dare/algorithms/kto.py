"""ELBO-KTO (Jindal et al. 2025): good and bad completions without pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dare.algorithms.base import RowKind
from dare.algorithms.preference import (
    Beta,
    NumViews,
    Plan,
    PlanOptions,
    PreferenceAlgorithm,
    PreferenceOptions,
    elbo_views,
    is_preferred,
    is_ranked,
    side_metrics,
)
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.objectives import reduce
from dare.objectives.preference import kto_loss

if TYPE_CHECKING:
    from torch import Tensor


class KTOOptions(PreferenceOptions, PlanOptions):
    beta: Beta = 0.2
    views_per_sample: NumViews = 8
    plan: Plan = "exact_count"
    draws: Literal["visit", "row"] = Field(
        "row", description="new masks whenever a row comes up, or the same ones for it in every epoch"
    )
    baseline: Literal["batch_mean", "zero"] = Field(
        "batch_mean", description="what margins are compared with: their mean over the batch (no gradient), or 0"
    )
    weight_good: float = Field(1.0, gt=0.0, description="weight of preferred completions")
    weight_bad: float = Field(1.0, gt=0.0, description="weight of the others")


class KTO(PreferenceAlgorithm[KTOOptions]):
    """mean_b w_b (1 - sigma(+-beta (m_b - z))), m = ELBO - ELBO_reference, plus for good completions and minus for bad.

    z is the mean margin of the whole optimizer step, not of a process; KTO's own baseline, a KL from mismatched
    prompts, would need further forwards. The public code draws mask counts unstratified.
    """

    Config = KTOOptions
    row_kind: ClassVar[RowKind] = "labelled"

    def draw(self, samples: Samples, key: Key) -> Views:
        return elbo_views(samples, key, self.options, self.options.views_per_sample)

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        options = self.options
        elbo_B, margin_B = self.margins(logp_RS, reference_RS, views, samples)
        is_good_B = is_preferred(samples)
        baseline = reduce.mean(margin_B.detach()) if options.baseline == "batch_mean" else torch.zeros(())
        loss_B = kto_loss(margin_B, is_good_B, baseline, options.beta, options.weight_good, options.weight_bad)
        score_B = torch.where(is_good_B, margin_B - baseline, baseline - margin_B)
        metrics = {
            "reward_accuracy": reduce.metric(is_ranked(score_B)),
            "baseline": reduce.metric(options.beta * baseline),
            **side_metrics(elbo_B, options.beta * margin_B, is_good_B, ~is_good_B),
        }
        return Loss(reduce.mean(loss_B), metrics)
