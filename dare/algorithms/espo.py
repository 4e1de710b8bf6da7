"""ESPO (Ou et al. 2025): the sequence is the action, its log-likelihood an ELBO estimate, with one ratio each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class ESPOOptions(PolicyOptions):
    advantage: Advantage = "loo"
    eps: Epsilon = 0.2
    beta: Beta = 0.001
    kl: KL = "k2"
    num_mc: int = Field(2, ge=1, description="pairs of complementary masks per sample (Monte-Carlo draws)")
    tail: Literal["scored", "keep_masked"] = Field(
        "scored",
        description="positions after the first EOS: part of the likelihood (paper), or always masked and not scored",
    )


class ESPO(PolicyAlgorithm[ESPOOptions]):
    """2 num_mc views per sample: l of L tokens masked, l uniform on {0..L}, and their complement.

    The ELBO estimate is the weighted sum over views and positions (`corrupt.coupled_exact_count`); on block models it
    is the sum of the blocks' ELBOs. Loss: mean over samples of -PPO(exp((ELBO - ELBO_old) / L), A)
    + beta k2(ELBO - ELBO_reference) / L, L the tokens in the likelihood. The KL sees the undivided difference.
    Differences from the public code: l is stratified over the draws of a sample with integer offsets instead of over
    the micro-batch with rounding, which skips counts; the mean is that of the whole batch; log-probs are taken at the
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
        def elbo(view_logp_RS: Tensor) -> Tensor:
            return likelihood.per_sequence(view_logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)

        length_B = corrupt.completion_scope(samples, self.options.tail).is_target_BS.sum(-1)
        new_B = elbo(logp_RS)
        log_ratio_B = reduce.divide(new_B - elbo(old_RS), length_B)
        loss_B, metrics = self.policy_loss(log_ratio_B, samples.advantage_B.double())
        metrics["elbo_per_token"] = reduce.metric(reduce.divide(new_B, length_B))
        if reference_RS is not None:
            kl_B, metrics["kl"] = self.kl_loss(new_B - elbo(reference_RS))
            loss_B = loss_B + reduce.divide(kl_B, length_B)
        return Loss(reduce.mean(loss_B), metrics)
