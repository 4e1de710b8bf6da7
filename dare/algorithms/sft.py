"""Supervised fine-tuning on the weighted ELBO: LLaDA (Nie et al. 2025) on full attention, BD3-LM and SDAR on blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from dare.algorithms.base import Algorithm
from dare.core.lazy import torch
from dare.core.options import Options
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.diffusion.schedule import ScheduleName
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class SFTOptions(Options):
    schedule: ScheduleName = Field("linear", description="mask probability and loss weight as functions of t")
    t_min: float = Field(1e-3, gt=0.0, lt=0.5, description="lowest t; bounds the loss weight by about 1 / t_min")
    norm: Literal["sequence", "token", "batch"] = Field(
        "sequence",
        description="sequence: mean over samples of the mean per token; token: mean per token; batch: per sample",
    )
    views_per_sample: int = Field(1, ge=1, description="masks per sample, with evenly spread t; their loss is averaged")
    is_complementary: bool = Field(False, description="views come in pairs of a mask and its complement")
    time_per: Literal["block", "sample"] = Field(
        "block", description="block models: one t per block, or one per sample"
    )

    @model_validator(mode="after")
    def _check(self) -> SFTOptions:
        if self.is_complementary and self.schedule != "linear":
            raise ValueError(f"is_complementary needs schedule: linear, got {self.schedule}; change one of them")
        if self.is_complementary and self.views_per_sample % 2:
            raise ValueError(f"is_complementary needs an even views_per_sample, got {self.views_per_sample}; use 2")
        return self


class SFT(Algorithm[SFTOptions]):
    """Each scored token masked with probability p = 1 - alpha(t), t uniform on [t_min, 1); its loss is w(t) nll.

    With the defaults p = (1 - eps) t + eps and the loss is mean_b (1 / L_b) sum nll / p, LLaDA's; L_b counts the scored
    tokens of sample b. A view in which nothing is masked contributes 0: redrawing it, as SDAR does, would bias short
    samples. `norm` token and batch divide by all scored tokens and by the number of samples.
    """

    Config = SFTOptions
    kind: ClassVar[Literal["online", "offline"]] = "offline"
    is_linear: ClassVar[bool] = True

    def corrupt(self, samples: Samples, key: Key) -> Views:
        options = self.options
        is_time_per_block = options.time_per == "block"
        if options.is_complementary:
            return corrupt.complementary_bernoulli(
                samples,
                key,
                num_pairs=options.views_per_sample // 2,
                t_min=options.t_min,
                is_time_per_block=is_time_per_block,
            )
        return corrupt.bernoulli(
            samples,
            key,
            num_views=options.views_per_sample,
            schedule=options.schedule,
            t_min=options.t_min,
            is_time_per_block=is_time_per_block,
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        batch_size = samples.canvas.batch_size
        nll_B = -likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, batch_size)
        length_B = samples.is_scored_BS.sum(-1)
        if self.options.norm == "sequence":
            value = reduce.mean(reduce.divide(nll_B, length_B))
        elif self.options.norm == "token":
            value = reduce.divide(nll_B.sum(), length_B.sum())
        else:
            value = reduce.mean(nll_B)
        is_masked_RS = views.is_target_RS
        is_candidate_RS = samples.is_scored_BS[views.sample_R]
        metrics = {
            "nll_masked": reduce.metric(-logp_RS, is_masked_RS),
            "mask_ratio": reduce.metric(is_masked_RS, is_candidate_RS),
            "has_mask": reduce.metric(torch.any(is_masked_RS, -1)),
        }
        return Loss(value, metrics)
