"""IPO (Azar et al. 2023) on ELBOs: a regression of the score instead of a classification."""

from __future__ import annotations

from pydantic import Field

from dare.algorithms.preference import Beta, ElboPairAlgorithm, ElboPairOptions, NumViews, Plan
from dare.objectives.preference import Link


class IPOOptions(ElboPairOptions):
    beta: Beta = 0.1
    views_per_sample: NumViews = 8
    plan: Plan = "exact_count"
    link: Link = Field("squared", description="squared; the others are those of vrpo")


class IPO(ElboPairAlgorithm[IPOOptions]):
    """(s - 1 / (2 beta))^2 with VRPO's score and views: the margin is driven to 1 / (2 beta) nats and no further."""

    Config = IPOOptions
