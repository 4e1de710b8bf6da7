"""UniGRPO (Yang et al. 2025, "MMaDA"): GRPO on the masked tokens of randomly masked completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class UniGRPOOptions(PolicyOptions):
    advantage: Advantage = "std4"
    eps: Epsilon = 0.2
    beta: Beta = 0.01
    kl: KL = "k3"
    num_views: int = Field(2, ge=1, description="masks per sample and update, with evenly spread mask ratios")
    t_min: float = Field(1e-3, gt=0.0, lt=1.0, description="lowest mask ratio")
    t_max: float = Field(1.0, gt=0.0, le=1.0, description="highest mask ratio")

    @model_validator(mode="after")
    def _check(self) -> UniGRPOOptions:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}; exchange them")
        return self


class UniGRPO(PolicyAlgorithm[UniGRPOOptions]):
    """`num_views` views per sample: each completion token masked with probability t, t uniform on [t_min, t_max).

    The prompt is never masked. Ratio and KL per masked token, none weighted by 1 / t; the loss is the mean over views
    of the mean over the view's scored tokens. A view that masks none of them does not count.

    The paper (Algorithm 1) draws the noise level of a rollout's first inner iteration and spaces those of the others
    evenly from there to the fully masked end; here each iteration spreads levels over its own views, so every one is
    balanced by itself. Its training code is not public: advantages, eps and beta are the usual ones of GRPO. With t in
    (0.1, 0.9) and many views this is dLLM-RL's random masking, which however sums its KL over a view's tokens and takes
    it to the old policy.
    """

    Config = UniGRPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        options = self.options
        return corrupt.bernoulli(
            samples,
            key,
            num_views=options.num_views,
            t_min=options.t_min,
            t_max=options.t_max,
            is_time_per_block=False,
            scope=corrupt.completion_scope(samples, "corrupted"),
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        is_scored_RS = views.is_target_RS
        advantage_R = samples.advantage_B[views.sample_R]
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        item_RS, metrics = self.token_loss(logp_RS.double(), old_RS, anchor_RS, advantage_R, is_scored_RS)
        view_R1 = torch.arange(views.num_views, device=is_scored_RS.device)[:, None]
        return Loss(reduce.mean_of_means(item_RS, is_scored_RS, view_R1, views.num_views), metrics)
