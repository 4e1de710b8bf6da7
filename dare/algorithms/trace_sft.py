"""Trace distillation: supervised learning on the model's own verified trajectories, faster than they were sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from dare.algorithms.base import Algorithm
from dare.core.lazy import torch
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
    norm: Literal["token", "constant"] = Field(
        "token", description="token: mean per token; constant: per state and norm_length tokens"
    )
    norm_length: int | None = Field(None, ge=1, description="norm constant: tokens that every state counts as")

    @model_validator(mode="after")
    def _check(self) -> TraceSFTOptions:
        if (self.norm == "constant") != (self.norm_length is not None):
            raise ValueError(f"norm_length goes with norm: constant, got norm {self.norm} and {self.norm_length}")
        return self


class TraceSFT(Algorithm[TraceSFTOptions]):
    """Each (shrunk) step of a verified rollout is a view, its tokens the targets; the mean nll per token.

    Every scored token is learnt once, from the state in which the rollout chose it, so order is distilled along with
    content. With `shrink` k a state is asked for all that the next k steps revealed: paths become shorter
    (LLaDA2.0's and dParallel's distillation). dLLM-RL's `trace` training divides each state's sum by the width of the
    response, which is norm constant. Nothing compares completions: the reward only decides which are kept.
    """

    Config = TraceSFTOptions
    kind: ClassVar[Literal["online", "offline"]] = "online"
    needs_step_map: ClassVar[bool] = True
    compares_rewards: ClassVar[bool] = True  # with a bar
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
        nll_RS = -weight_R1 * logp_RS
        if self.options.norm_length is None:
            value = reduce.masked_mean(nll_RS, is_learnt_RS)
        else:
            is_learnt_R = is_learnt_RS.any(-1)
            total_R = torch.where(is_learnt_RS, nll_RS, 0.0).sum(-1)
            length_R = torch.full_like(is_learnt_R, self.options.norm_length, dtype=torch.int64)
            value = reduce.masked_mean(reduce.divide(total_R, length_R), is_learnt_R)
        metrics = {
            "nll": reduce.metric(-logp_RS, is_learnt_RS),
            "learnt": reduce.metric((samples.advantage_B != 0).double()),
        }
        return Loss(value, metrics)
