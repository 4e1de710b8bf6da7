"""TraceRL (Wang et al. 2025): GRPO along the rollout's own trace, several steps shrunk into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, KLTarget, TraceAlgorithm, TraceOptions
from dare.core.decode import Decode
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LOG_RATIO = 10.0


class TraceRLOptions(TraceOptions):
    advantage: Advantage = "zpop"
    eps: Epsilon = 0.2
    beta: Beta = 0.01
    kl: KL = "k3"
    kl_to: KLTarget = "old"
    shrink: int = Field(1, ge=1, description="consecutive steps of a block (masked models: of all) scored as one")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: mean over scored tokens; faithful: mean over views of the public code's view loss"
    )


class TraceRL(TraceAlgorithm[TraceRLOptions]):
    """One view per (shrunk) step, scoring what it committed; on block models step r of every block is one view.

    Ratio and KL per token, the KL to the old policy (as published) or to the reference. clean: the mean over the scored
    tokens of the batch. faithful, block models: each view's sum over tokens divided by the completion length,
    log-ratios clamped to +-10; masked models: each view's policy term averaged and its KL summed over its
    tokens; both: the mean over views, so samples of many steps weigh more. With shrink > 1 a step's tokens are scored
    as if committed at once. Dropping prompts by their solve rate is the trainer's business; no critic here. The
    public code makes many optimizer steps per rollout over its views; here one per inner iteration on all of them.
    """

    Config = TraceRLOptions

    def check_rollouts(self, decode: Decode) -> list[str]:
        if self.options.shrink > 1 and self.reads_recorded:
            raise self._not_the_same("algorithm.shrink", self.options.shrink, 1)
        return super().check_rollouts(decode)

    def corrupt(self, samples: Samples, key: Key) -> Views:
        temperature = self.temperature(samples)
        return corrupt.trace_replay(samples, samples.is_scored_BS, shrink=self.options.shrink, temperature=temperature)

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        is_target_RS, is_blockwise = views.is_target_RS, samples.canvas.is_blockwise
        is_faithful = self.options.variant == "faithful"
        old_RS = self.old_logp(old_RS, views, samples)
        log_ratio_RS = self.log_ratio(logp_RS.double() - old_RS, views)
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        difference_RS = logp_RS.double() - (old_RS if anchor_RS is None else anchor_RS)
        if is_faithful and is_blockwise:
            log_ratio_RS = log_ratio_RS.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
            difference_RS = difference_RS.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        advantage_RS = self.token_advantages(old_RS, views, samples)
        item_RS, metrics = self.policy_loss(log_ratio_RS, advantage_RS, is_target_RS)
        kl_RS, metrics["kl"] = self.kl_loss(difference_RS, is_target_RS)
        if not is_faithful:
            return Loss(reduce.masked_mean(item_RS + kl_RS, is_target_RS), metrics)
        zero = torch.zeros((), dtype=item_RS.dtype)
        policy_R, kl_R = (torch.where(is_target_RS, value, zero).sum(-1) for value in (item_RS, kl_RS))
        if is_blockwise:
            length_R = samples.canvas.is_completion_BS.sum(-1)[views.sample_R]
            return Loss(reduce.mean(reduce.divide(policy_R + kl_R, length_R)), metrics)
        return Loss(reduce.mean(reduce.divide(policy_R, is_target_RS.sum(-1)) + kl_R), metrics)
