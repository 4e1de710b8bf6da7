"""VRPO (LLaDA 1.5, Zhu et al. 2025): DPO on ELBOs, with the variance of the estimated score brought down."""

from __future__ import annotations

from dare.algorithms.preference import Beta, ElboPairAlgorithm, ElboPairOptions, NumViews, Plan


class VRPOOptions(ElboPairOptions):
    beta: Beta = 0.2
    views_per_sample: NumViews = 8
    plan: Plan = "exact_count"


class VRPO(ElboPairAlgorithm[VRPOOptions]):
    """-log sigma(beta s), s = (ELBO - ELBO_reference of the chosen) - (the same of the rejected), mean over pairs.

    Many noise levels with one mask each, spread evenly; policy and reference see the same masks, so s is exactly 0
    where they agree. ELBOs are sums over the completion. The public re-implementation divides them by the padded width
    of the batch, which turns beta into beta / width; `norm: length` divides by the completion's own tokens.
    """

    Config = VRPOOptions
