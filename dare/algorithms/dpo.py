"""DPO on one draw per completion, as LLaDA2.0 aligns block models (two streams, every block scored in one forward)."""

from __future__ import annotations

from dare.algorithms.preference import Beta, ElboPairAlgorithm, ElboPairOptions, NumViews, Plan


class DPOOptions(ElboPairOptions):
    beta: Beta = 0.1
    views_per_sample: NumViews = 1
    plan: Plan = "bernoulli"


class DPO(ElboPairAlgorithm[DPOOptions]):
    """VRPO's loss from a single Bernoulli(t) view per completion, on block models with a noise level per block.

    As cheap as SFT on both sides and noisier than VRPO: the loss is nonlinear in the estimated score, so its bias and
    variance grow with the variance of the draws.
    """

    Config = DPOOptions
