"""ESPO (Ou et al. 2025): the sequence is the action, its log-likelihood an ELBO estimate, with one ratio each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions, Tail
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt

if TYPE_CHECKING:
    from torch import Tensor


class ESPOOptions(PolicyOptions):
    advantage: Advantage = "loo"
    eps: Epsilon = 0.2
    beta: Beta = 0.001
    kl: KL = "k2"
    num_mc: int = Field(2, ge=1, description="pairs of complementary masks per sample (Monte-Carlo draws)")
    tail: Tail = "scored"


class ESPO(PolicyAlgorithm[ESPOOptions]):
    """2 num_mc views per sample: l of L tokens masked, l uniform on {0..L}, and their complement.

    The ELBO estimate is the weighted sum over views and positions (`corrupt.coupled_exact_count`); on block models it
    is the sum of the blocks' ELBOs. Loss: mean over samples of -PPO(exp((ELBO - ELBO_old) / L), A)
    + beta k2(ELBO - ELBO_reference) / L, L the tokens in the likelihood. The KL sees the undivided difference.
    Differences from the public code: l is stratified over the draws of a sample with integer offsets instead of over
    the micro-batch with rounding (a law of batch mates, so not offered); the tail is scored as there, unless `tail`
    says otherwise; the mean is that of the whole batch; log-probs are taken at the
    rollout temperature.
    """

    Config = ESPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return corrupt.coupled_exact_count(
            samples,
            key,
            num_pairs=self.options.num_mc,
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
            ratio_norm="length",
            kl_norm="length",
        )
