"""AGRPO (Zhan 2025, "Simple policy gradients"): the policy gradient of the denoising chain from a few of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, TraceAlgorithm, TraceOptions
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, plans
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class AGRPOOptions(TraceOptions):
    advantage: Advantage = "mean"
    eps: Epsilon = 0.2
    beta: Beta = 0.0
    kl: KL = "k3"
    num_steps: int = Field(8, ge=1, description="denoising steps of each sample that an update scores")


class AGRPO(TraceAlgorithm[AGRPOOptions]):
    """`num_steps` of the T steps of the trace, evenly spaced from a random start, weight T / num_steps each.

    Ratio and KL per committed token through the first EOS. The loss is the weighted sum of the tokens' terms over the
    number of scored tokens of the batch: an unbiased estimate of CJ-GRPO's clean loss, whose denoising steps are the
    actions of a Markov decision process. A fresh choice of steps in each inner iteration.

    Advantages, clip and the missing KL are those of the author's code. That divides the summed terms of the drawn steps
    by their number and by samples instead of tokens, draws steps with low discrepancy over the batch (here over a
    sample's own draws), optionally in proportion to their entropy, and renormalises log-probs over what top-k and top-p
    leave.
    The trace likelihood has CJ-GRPO's condition on how positions are chosen.
    """

    Config = AGRPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        views = corrupt.trace_replay(samples, samples.is_scored_BS, temperature=self.temperature(samples))
        return plans.sample_views(views, samples, key.fold("steps"), num=self.options.num_steps)

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        item_RS, metrics = self.trace_loss(logp_RS, old_RS, reference_RS, views, samples)
        num_tokens = corrupt.scored_scope(samples).is_target_BS.sum()
        return Loss(reduce.divide((item_RS * views.weight_RS).sum(), num_tokens), metrics)
