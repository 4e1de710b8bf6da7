"""SPG, sandwiched policy gradient (Wang et al. 2025): lower bound of good samples up, upper bound of bad ones down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import Advantage, GroupAlgorithm, GroupOptions, Tail
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood, plans
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class SPGOptions(GroupOptions):
    advantage: Advantage = "mean"
    negative: Literal["mix", "eubo", "elbo", "zero"] = Field(
        "mix", description="what stands for the log-likelihood of samples with advantage <= 0; zero: nothing"
    )
    power: float = Field(1.5, gt=0.0, description="exponent of the upper bound's power mean; towards 0 it is the ELBO")
    mix_weight: float = Field(0.5, ge=0.0, le=1.0, description="for negative: mix, the share of the upper bound")
    num_views: int = Field(2, ge=1, description="masks per sample (Monte-Carlo draws)")
    masking: Literal["block_random", "random"] = Field(
        "block_random", description="as a block-by-block rollout at a random block, or l random tokens of all"
    )
    min_ratio: float = Field(0.0, ge=0.0, le=1.0, description="lowest share of a block that is masked")
    prompt_noise: float = Field(0.15, ge=0.0, lt=1.0, description="probability with which a clean token is masked")
    tail: Tail = "keep_masked"
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="faithful: uneven choice of blocks, and masked later blocks enter the average"
    )


class SPG(GroupAlgorithm[SPGOptions]):
    """`num_views` views per sample (`plans.block_random`); loss -sum_i |o_i| A_i l_i / sum_i |o_i|.

    Samples with A > 0: l = mean over views of the mean log-prob of the view's targets. The others: the upper bound
    l = (1 / power) mean over tokens k of log(mean over views of p(k)^power 1[k masked] / ratio), ratio the share of
    scored tokens that the view masks (`likelihood.per_token_power_mean`), mixed with the former. It increases with
    `power` and is at least the lower bound on the same masks, but with its constant dropped it is not an upper bound
    of log p for every sample. No ratio, so later inner iterations are off policy uncorrected; no KL.

    faithful: the block index favours early blocks, and the average runs over every masked token although the public
    code computes, and never uses, a restriction to the current block. Differences under either variant: a token leaves
    the upper bound if no view masks it, not if its power underflows; sums run over the whole batch; padding is hidden.
    """

    Config = SPGOptions

    @property
    def needs_old(self) -> bool:
        return False

    def corrupt(self, samples: Samples, key: Key) -> Views:
        options = self.options
        if options.masking == "random":
            scope = corrupt.completion_scope(samples, options.tail)
            temperature = self.temperature(samples)
            return corrupt.exact_count(samples, key, num_views=options.num_views, scope=scope, temperature=temperature)
        return plans.block_random(
            samples,
            key,
            num_views=options.num_views,
            min_ratio=options.min_ratio,
            prompt_noise=options.prompt_noise,
            is_published=options.variant == "faithful",
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        options, num = self.options, samples.canvas.batch_size
        is_target_RS = views.is_target_RS
        view_mean_R = reduce.divide((logp_RS.double() * is_target_RS).sum(-1), is_target_RS.sum(-1))
        lower_B = reduce.group_mean(view_mean_R, views.sample_R, num)
        length_B = samples.is_scored_BS.sum(-1)
        upper_B = likelihood.per_token_power_mean(
            logp_RS, is_target_RS, length_B[views.sample_R], views.sample_R, num, options.power
        )
        share = {"mix": options.mix_weight, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[options.negative]
        negative_B = share * upper_B + (1 - share) * lower_B
        if options.negative == "zero":
            negative_B = negative_B.detach() * 0
        is_positive_B = samples.advantage_B > 0
        bound_B = lower_B.where(is_positive_B, negative_B)
        value = reduce.divide(-(length_B * samples.advantage_B.double() * bound_B).sum(), length_B.sum())
        gap = reduce.metric(upper_B - lower_B)
        return Loss(value, {"elbo_per_token": reduce.metric(lower_B), "eubo_gap": gap})
