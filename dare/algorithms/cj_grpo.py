"""CJ-GRPO (Yang et al. 2025, "EOSER-ASS"): GRPO on the log-probs of the denoising steps that the rollout took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, TraceAlgorithm, TraceOptions
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class CJGRPOOptions(TraceOptions):
    advantage: Advantage = "mean"
    eps: Epsilon = 0.5
    beta: Beta = 0.04
    kl: KL = "k3"
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: mean over scored tokens; faithful: tail tokens too, and every step weighs the same"
    )


class CJGRPO(TraceAlgorithm[CJGRPOOptions]):
    """One view per denoising step: the canvas before the step, scoring the tokens it committed. Ratio and KL per token.

    clean: tokens through the first EOS, the loss is their mean over the batch. faithful: all committed tokens, the
    loss is the mean over steps of each step's token mean over the batch, as in the public code, which yields NaN for a
    step without a commit; here such a step does not count. On block models step r of every block is one view. The
    views are the same in every inner iteration. The likelihood of a trace is exact only if positions were chosen
    without regard to the sampled tokens; log-probs are taken at the rollout temperature (public code: 1).
    """

    Config = CJGRPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        is_clean = self.options.variant == "clean"
        is_target_BS = samples.is_scored_BS if is_clean else samples.canvas.is_completion_BS
        return corrupt.trace_replay(samples, is_target_BS, temperature=self.temperature(samples))

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        is_scored_RS = views.is_target_RS
        item_RS, metrics = self.trace_loss(logp_RS, old_RS, reference_RS, views, samples)
        if self.options.variant == "clean":
            value = reduce.masked_mean(item_RS, is_scored_RS)
        else:
            num_steps = int(views.view_R.max()) + 1
            value = reduce.mean_of_means(item_RS, is_scored_RS, views.view_R[:, None], num_steps)
        return Loss(value, metrics)
