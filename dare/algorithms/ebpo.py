"""EBPO (LLaDA2.1 technical report, equations 4 and 5): one ratio per sequence, of block-ELBO estimates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions, RatioNorm, Tail
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt

if TYPE_CHECKING:
    from torch import Tensor


class EBPOOptions(PolicyOptions):
    advantage: Advantage = "std6"
    eps: Epsilon = 0.2
    beta: Beta = 0.0
    kl: KL = "k2"
    dual_clip: float | None = Field(3.0, gt=1.0, description="cap of the ratio where the advantage is negative")
    num_mc: int = Field(16, ge=1, description="views per sample; each corrupts every block")
    ratio_norm: RatioNorm = "none"
    tail: Tail = "keep_masked"


class EBPO(PolicyAlgorithm[EBPOOptions]):
    """`num_mc` views per sample, each with l of the n scored tokens of every block masked, l uniform on {1..n}.

    The ELBO is the sum over blocks and the mean over views of n / l times the masked log-probs. Loss: the mean over
    samples of -PPO(exp(ELBO - ELBO_old), A) + beta KL(ELBO - ELBO_reference), both undivided; the clip acts on the
    logarithm, so no ratio overflows. `ratio_norm: length` makes the ratio one per token: undivided it leaves any fixed
    clip interval as sequences grow. On masked models the completion is one block, and this is ESPO with other views.

    The report gives neither eps nor the number of views; the defaults are those of the public re-implementation.
    That stratifies l over views and blocks of a sample together, here over the views of each block: the law of each
    cell is the same. Edits of committed tokens (LLaDA2.1) are no part of the likelihood.
    """

    Config = EBPOOptions

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return corrupt.exact_count(
            samples,
            key,
            num_views=self.options.num_mc,
            scope=corrupt.completion_scope(samples, self.options.tail),
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        return self.elbo_loss(
            logp_RS,
            old_RS,
            reference_RS,
            views,
            samples,
            length_B=corrupt.completion_scope(samples, self.options.tail).is_target_BS.sum(-1),
            ratio_norm=self.options.ratio_norm,
            kl_norm=self.options.ratio_norm,
        )
