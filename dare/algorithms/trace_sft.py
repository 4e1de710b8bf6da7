"""Trace distillation: supervised learning on the model's own verified trajectories, faster than they were sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dare.algorithms.base import Algorithm
from dare.core.options import Options
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.diffusion import corrupt
from dare.objectives import reduce

if TYPE_CHECKING:
    from torch import Tensor


class TraceSFTOptions(Options):
    min_reward: float = Field(1.0, description="completions with at least this reward are learnt, the others left out")
    shrink: int = Field(
        1, ge=1, description="denoising steps that are learnt as one: what a state reveals in that many steps"
    )


class TraceSFT(Algorithm[TraceSFTOptions]):
    """Each (shrunk) step of a verified rollout is a view, its tokens the targets; the mean nll per token.

    Every scored token is learnt once, from the state in which the rollout chose it, so order is distilled along with
    content. With `shrink` k a state is asked for all that the next k steps revealed: paths become shorter
    (LLaDA2.0's and dParallel's distillation; dLLM-RL's `trace` training with k = 1, whose sums are divided by the width
    of the batch instead). Nothing compares completions: the reward only decides which are kept.
    """

    Config = TraceSFTOptions
    kind: ClassVar[Literal["online", "offline"]] = "online"
    needs_step_map: ClassVar[bool] = True
    is_linear = True

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        """1 for completions that are learnt, else 0."""
        return (reward_B >= self.options.min_reward).float()

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return corrupt.trace_replay(samples, samples.is_scored_BS, shrink=self.options.shrink)

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        weight_R1 = samples.advantage_B[views.sample_R, None].double()
        is_learnt_RS = views.is_target_RS & (weight_R1 != 0)
        value = reduce.masked_mean(-weight_R1 * logp_RS, is_learnt_RS)
        metrics = {
            "nll": reduce.metric(-logp_RS, is_learnt_RS),
            "learnt": reduce.metric((samples.advantage_B != 0).double()),
        }
        return Loss(value, metrics)
