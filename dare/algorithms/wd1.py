"""wd1 (Tang et al. 2025): advantage-weighted log-likelihood, with no ratio and no old or reference policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dare.algorithms.policy import Advantage, GroupAlgorithm, GroupOptions
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce
from dare.objectives.advantage import group_softmax

if TYPE_CHECKING:
    from torch import Tensor


class WD1Options(GroupOptions):
    advantage: Advantage = "mean"
    terms: Literal["both", "positive"] = Field(
        "both", description="both: raise good and lower bad completions; positive: only raise"
    )
    prompt_noise: float = Field(0.15, ge=0.0, lt=1.0, description="probability with which a prompt token is masked")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: softmax within each group, mean over groups; faithful: softmax over the batch"
    )


class WD1(GroupAlgorithm[WD1Options]):
    """One view per sample as in d1; loss -sum_i (w+_i - w-_i) l_i with l_i the sum of the scored log-probs.

    w+ = softmax(A), w- = softmax(-A): the solution of a reverse-KL-regularised problem, and its mirror image. Equal
    rewards give weights of exactly 0. clean: a softmax per group and the mean over groups, so that prompts neither mix
    nor multiply. faithful: one softmax over the batch (the public code: over the device's share of it), and the sum.
    Advantages are not divided by the deviation, so the weights depend on the scale of the rewards. The variant with a
    reference policy in the sampler is left out: the public code cannot run it.
    """

    Config = WD1Options
    normalises_advantages: ClassVar[bool] = True
    is_linear = True

    def corrupt(self, samples: Samples, key: Key) -> Views:
        prompt_noise = self.options.prompt_noise
        return corrupt.all_masked(samples, key, prompt_noise=prompt_noise, temperature=self.temperature(samples))

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        batch_size = samples.canvas.batch_size
        is_clean = self.options.variant == "clean"
        group_B = samples.group_B if is_clean else torch.zeros_like(samples.group_B)
        weight_B = group_softmax(samples.advantage_B, group_B)
        if self.options.terms == "both":
            weight_B = weight_B - group_softmax(-samples.advantage_B, group_B)
        logp_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, batch_size)
        num_groups = torch.tensor(len(torch.unique(group_B)))
        metrics = {"logp": reduce.metric(logp_RS, views.is_target_RS), "weight": reduce.metric(weight_B.abs())}
        return Loss(reduce.divide(-(weight_B * logp_B).sum(), num_groups), metrics)
