"""diffu-GRPO (Zhao et al. 2025, "d1"): GRPO on one-step mean-field log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class D1Options(PolicyOptions):
    advantage: Advantage = "mean"
    eps: Epsilon = 0.5
    beta: Beta = 0.04
    kl: KL = "k3"
    prompt_noise: float = Field(0.15, ge=0.0, lt=1.0, description="probability with which a prompt token is masked")


class D1(PolicyAlgorithm[D1Options]):
    """One view per sample: the completion fully masked, the prompt partly. Ratio and KL per token.

    The loss is the mean over the scored tokens of the batch of -PPO(r, A) + beta k3. A fresh prompt mask per inner
    iteration regularises the reuse of a rollout. Differences from the public code: the token mean is that of the whole
    batch instead of each micro-batch; padding is neither seen nor noised; log-probs are taken at the rollout
    temperature (`score_temperature: one` restores theirs).
    """

    Config = D1Options

    def corrupt(self, samples: Samples, key: Key) -> Views:
        prompt_noise = self.options.prompt_noise
        return corrupt.all_masked(samples, key, prompt_noise=prompt_noise, temperature=self.temperature(samples))

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        advantage_R = samples.advantage_B[views.sample_R]
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        item_RS, metrics = self.token_loss(logp_RS.double(), old_RS, anchor_RS, advantage_R, views.is_target_RS)
        return Loss(reduce.masked_mean(item_RS, views.is_target_RS), metrics)
