"""dTRPO (Zhang et al. 2026): DPO on trajectories, each estimated from one re-masked state."""

from __future__ import annotations

from pydantic import Field

from dare.algorithms.preference import Beta, NumViews, PairAlgorithm, PairOptions
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import plans


class DTRPOOptions(PairOptions):
    beta: Beta = 0.1
    views_per_sample: NumViews = 1
    tokens_per_step: int = Field(1, ge=1, description="tokens that a denoising step of the trajectory commits")


class DTRPO(PairAlgorithm[DTRPOOptions]):
    """DPO's loss, the log-likelihood being that of a denoising trajectory of the completion.

    One random step of every block (masked models: of the completion) is scored: its tokens, given what came before
    them in a random order, times the number of steps. So a view estimates the whole trajectory without bias, and one
    forward scores it. Rows of a dataset have no recorded trajectory; the paper's code was not public to compare with.
    """

    Config = DTRPOOptions

    def draw(self, samples: Samples, key: Key) -> Views:
        options = self.options
        return plans.random_step(
            samples, key, num_views=options.views_per_sample, tokens_per_step=options.tokens_per_step
        )
