"""GDPO, group diffusion policy optimization (Rojas et al. 2025): a sequence ratio of ELBOs by Gaussian quadrature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions, RatioNorm, Tail
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, plans

if TYPE_CHECKING:
    from torch import Tensor


class GDPOOptions(PolicyOptions):
    advantage: Advantage = "mean"
    eps: Epsilon = 0.2
    beta: Beta = 0.0
    kl: KL = "k2"
    num_nodes: int = Field(3, ge=1, description="quadrature nodes in t, one mask each")
    ratio_norm: RatioNorm = "length"
    tail: Tail = "scored"


class GDPO(PolicyAlgorithm[GDPOOptions]):
    """`num_nodes` views per sample, one at each Gauss-Legendre node t_n, weight w_n / t_n (`plans.quadrature`).

    Most of the variance of an ELBO estimate comes from t, which the quadrature integrates without noise: given all
    masks at the nodes it is exact for L <= 2 num_nodes. Loss: the mean over samples of
    -PPO(exp((ELBO - ELBO_old) / L), A) + beta KL / L, with A the reward minus the group's mean.

    The paper's ratio is exp(ELBO) / exp(ELBO_old) with 1 / L before the clipped term; we divide inside the exponential,
    which has the same gradient on policy and a ratio that does not grow with L (`ratio_norm: none` leaves it
    undivided). Its masks have a fixed count at each node, about t L, one mask per node; ours are Bernoulli, for which
    the quadrature is exact. Its KL estimator, eps, beta and number of inner iterations were not found: k2 of the ELBO
    difference, as in ESPO. No relation to the reward normalisation of the same name (`reward.combine: decoupled`).
    """

    Config = GDPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return plans.quadrature(
            samples,
            key,
            num_nodes=self.options.num_nodes,
            scope=corrupt.completion_scope(samples, self.options.tail),
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        return self.elbo_loss(
            logp_RS,
            old_RS,
            reference_RS,
            views,
            samples,
            length_B=corrupt.completion_scope(samples, self.options.tail).is_target_BS.sum(-1),
            ratio_norm=self.options.ratio_norm,
            kl_norm="length",
        )
