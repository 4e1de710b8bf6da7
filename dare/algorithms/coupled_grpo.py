"""Coupled-GRPO (Gong et al. 2025, "DiffuCoder"): token log-probs from a full mask and a pair of complementary masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class CoupledGRPOOptions(PolicyOptions):
    advantage: Advantage = "loo"
    eps: Epsilon = 0.5
    beta: Beta = 0.01
    kl: KL = "k3"
    num_pairs: int = Field(1, ge=1, description="pairs of complementary masks per sample (lambda in the paper)")
    t_min: float = Field(0.2, gt=0.0, lt=1.0, description="lowest mask ratio of the first mask of a pair")
    t_max: float = Field(0.8, gt=0.0, lt=1.0, description="highest mask ratio of the first mask of a pair")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: expected weight 1 per token; faithful: the paper's, 1.5 with one pair"
    )

    @model_validator(mode="after")
    def _check(self) -> CoupledGRPOOptions:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}; exchange them")
        return self


class CoupledGRPO(PolicyAlgorithm[CoupledGRPOOptions]):
    """1 + 2 num_pairs views per sample; ratio and KL per token, on the weighted sum of the token's log-probs.

    Every token is scored once fully masked, weight w, and once in each pair, weight w / t or w / (1 - t). The pair's
    expected weight is 2w, so w = 1 / (1 + 2 num_pairs) makes the expected total 1 (clean); the paper's
    w = 1 / (1 + num_pairs) inflates log-ratios by up to 2 (faithful). The tail after the first EOS is masked at random
    like the rest but not scored. Differences from the public code under either variant: t is drawn per sample, not per
    batch; the token mean is that of the whole batch; log-probs are taken at the rollout temperature.
    """

    Config = CoupledGRPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        options = self.options
        pair_share = 2 if options.variant == "clean" else 1
        return corrupt.coupled_bernoulli(
            samples,
            key,
            num_pairs=options.num_pairs,
            t_min=options.t_min,
            t_max=options.t_max,
            weight=1.0 / (1 + pair_share * options.num_pairs),
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        def per_token(view_logp_RS: Tensor) -> Tensor:
            return likelihood.per_token(view_logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)

        is_scored_BS = corrupt.completion_scope(samples, "corrupted").is_target_BS
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        anchor_BS = None if anchor_RS is None else per_token(anchor_RS)
        item_BS, metrics = self.token_loss(
            per_token(logp_RS), per_token(old_RS), anchor_BS, samples.advantage_B, is_scored_BS
        )
        return Loss(reduce.masked_mean(item_BS, is_scored_BS), metrics)
