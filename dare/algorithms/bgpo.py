"""BGPO (Lin et al. 2025): a lower bound of the sequence objective that is a sum over Monte-Carlo draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions, Tail
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce
from dare.objectives.surrogate import linear_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class BGPOOptions(PolicyOptions):
    advantage: Advantage = "std6"
    eps: Epsilon = 0.2
    beta: Beta = 0.0
    kl: KL = "k2"
    dual_clip: float | None = Field(3.0, gt=1.0, description="cap of a draw's ratio where the advantage is negative")
    num_mc: int = Field(16, ge=1, description="masks per sample (Monte-Carlo draws)")
    tail: Tail = "keep_masked"
    norm: Literal["sequence", "token"] = Field(
        "sequence", description="mean over samples, or weighted by their scored tokens"
    )
    variant: Literal["clean", "faithful"] = Field(
        "clean",
        description="faithful: rounded mask counts; masked models divide log-ratios by the whole completion's length",
    )


class BGPO(PolicyAlgorithm[BGPOOptions]):
    """`num_mc` views per sample: l of its L scored tokens masked, l uniform on {1..L} and stratified over the views.

    Each view j estimates the ELBO, and d_j = (ELBO_j - ELBO_old,j) / L is a log-ratio of its own: the surrogate is that
    of 1 + d_j where A >= 0 and of exp(d_j) where A < 0, clipped per view and averaged over the views. It bounds the
    objective of exp(mean d) from below and has its value and gradient on policy. Replay makes the exact objective as
    cheap in memory here; the bound is kept as the algorithm that was published. With beta: KL of the mean ELBO / L.

    The clip per view is the public re-implementation's; the paper's bound has none. faithful divides by the padded
    width of the completion on masked models, as that code does (its block models use the sample's own length), and
    rounds evenly spread counts half to even, which skips some; `norm: token` weighs samples by length, as there. Not
    reproduced: exp(log(1 + d)), NaN for d <= -1; a KL that compares one draw with the reference's mean; the tail
    removed from the input (here masked or scored).
    """

    Config = BGPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return corrupt.exact_count(
            samples,
            key,
            num_views=self.options.num_mc,
            scope=corrupt.completion_scope(samples, self.options.tail),
            is_rounded=self.options.variant == "faithful",
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        options, sample_R, num = self.options, views.sample_R, samples.canvas.batch_size

        def elbo(view_logp_RS: Tensor) -> Tensor:
            return likelihood.per_view(view_logp_RS, views.weight_RS) * options.num_mc

        length_B = corrupt.completion_scope(samples, options.tail).is_target_BS.sum(-1)
        is_whole = options.variant == "faithful" and not samples.canvas.is_blockwise
        divisor_B = samples.canvas.is_completion_BS.sum(-1) if is_whole else length_B
        new_R = elbo(logp_RS)
        log_ratio_R = reduce.divide(new_R - elbo(old_RS), divisor_B[sample_R])
        objective_R, is_clipped_R = linear_surrogate(
            log_ratio_R, samples.advantage_B.double()[sample_R], *options.clip_interval, options.dual_clip
        )
        loss_B = -reduce.group_mean(objective_R, sample_R, num)
        metrics = {
            "ratio": reduce.metric(log_ratio_R.detach().exp()),
            "clip_fraction": reduce.metric(is_clipped_R),
            "elbo_per_token": reduce.metric(reduce.divide(new_R, length_B[sample_R])),
        }
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        if anchor_RS is not None:
            difference_B = reduce.group_mean(new_R - elbo(anchor_RS), sample_R, num)
            kl_B, metrics["kl"] = self.kl_loss(difference_B)
            loss_B = loss_B + reduce.divide(kl_B, length_B)
        if options.norm == "sequence":
            return Loss(reduce.mean(loss_B), metrics)
        return Loss(reduce.divide((length_B * loss_B).sum(), length_B.sum()), metrics)
