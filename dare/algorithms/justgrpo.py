"""JustGRPO (Ni et al. 2026): GRPO on the exact likelihood of left-to-right rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import plans
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class JustGRPOOptions(PolicyOptions):
    advantage: Advantage = "std4"
    eps: Epsilon = 0.2
    beta: Beta = 0.0
    kl: KL = "k3"
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: mean over scored tokens; faithful: tail tokens too, over L times the used samples"
    )


class JustGRPO(PolicyAlgorithm[JustGRPOOptions]):
    """One view per position, which masks it and everything after it; ratio and KL per token.

    The sum of a sample's log-probs is its exact log-likelihood under left-to-right sampling, one token per step
    (rollout with `unmask: left_to_right`). On masked models that takes L views; on block models each
    view serves a position of every block, given the clean blocks before it: K views, exact for left-to-right sampling
    within blocks. (A grid of one-token blocks would take one pass, but score another model than the one that samples.)

    clean: the mean over the scored tokens of the batch. faithful: all L completion tokens, the sum over samples divided
    by L (n + 1e-5), n the samples whose advantage is not 0. The public code counts n over one accumulation step and
    sums accumulation steps without dividing; here n counts the whole batch.
    """

    Config = JustGRPOOptions

    def check_rollouts(self, decode: Decode) -> list[str]:
        if decode.unmask == "left_to_right" and decode.steps_per_block is None:
            return []
        return [
            "the likelihood trained on is that of left-to-right rollouts, one token per step; set decode.unmask: "
            "left_to_right and remove decode.steps_per_block"
        ]

    def corrupt(self, samples: Samples, key: Key) -> Views:
        is_clean = self.options.variant == "clean"
        is_target_BS = samples.is_scored_BS if is_clean else samples.canvas.is_completion_BS
        return plans.left_to_right(samples, is_target_BS, temperature=self.temperature(samples))

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        advantage_R, is_target_RS = samples.advantage_B[views.sample_R], views.is_target_RS
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        item_RS, metrics = self.token_loss(logp_RS.double(), old_RS, anchor_RS, advantage_R, is_target_RS)
        if self.options.variant == "clean":
            return Loss(reduce.masked_mean(item_RS, is_target_RS), metrics)
        length_R = samples.canvas.is_completion_BS.sum(-1)[views.sample_R]
        total = reduce.divide((item_RS * is_target_RS).sum(-1), length_R).sum()
        return Loss(reduce.divide(total, (samples.advantage_B != 0).sum().double() + 1e-5), metrics)
