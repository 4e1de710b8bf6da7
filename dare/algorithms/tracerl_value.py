"""TraceRL with its diffusion value model (Wang et al. 2025, "Revolutionizing RL for diffusion language models")."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, KLTarget, PolicyAlgorithm, PolicyOptions
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Judgement, Loss, Samples, Views
from dare.diffusion import corrupt, likelihood
from dare.objectives import reduce
from dare.objectives.stepwise import stepwise_gae

if TYPE_CHECKING:
    from torch import Tensor


class TraceRLValueOptions(PolicyOptions):
    advantage: Advantage = "zpop"
    eps: Epsilon = 0.2
    beta: Beta = 0.01
    kl: KL = "k3"
    kl_to: KLTarget = "old"  # the paper's
    gamma: float = Field(1.0, ge=0.0, le=1.0, description="discount per denoising step")
    lam: float = Field(1.0, ge=0.0, le=1.0, description="lambda of the advantage estimate; 0 trusts the next value")
    value_clip: float = Field(0.2, gt=0.0, description="how far a value may move from the old one in the critic's loss")
    value_lr: float = Field(5e-6, gt=0.0, description="learning rate of the critic")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: mean over trained tokens; faithful: over views and the longest completion"
    )


class TraceRLValue(PolicyAlgorithm[TraceRLValueOptions]):
    """The views of trace replay, for the policy and for a critic with a scalar head that reads the same canvases.

    The reward arrives at the last denoising step that commits a scored token. Returns and advantages are those of
    `objectives.stepwise.stepwise_gae`, from values before the first update. Policy: -PPO + beta KL per token. Critic:
    max((V - R)^2, (V_clip - R)^2) / 2 with V_clip = V_old + clip(V - V_old, +-value_clip).

    clean     both losses are means over the trained tokens of the batch
    faithful  sums over tokens, divided by the number of views and by the longest completion, so a sample with more
              steps weighs more. The public block code also cuts log-ratios to +-10

    Rewards are not normalised within a group; `advantage_B` is only reported. Without the value model this is TraceRL.
    """

    Config = TraceRLValueOptions
    needs_step_map: ClassVar[bool] = True
    compares_rewards: ClassVar[bool] = True

    @property
    def critic_lr(self) -> float | None:
        return self.options.value_lr

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return corrupt.trace_replay(samples, samples.is_scored_BS, temperature=self.temperature(samples))

    def judge(self, value_RS: Tensor, views: Views, samples: Samples) -> Judgement:
        step_BS, reward_B, num = samples.step_map_BS, samples.reward_B, samples.canvas.batch_size
        if step_BS is None or reward_B is None:
            raise ValueError("these samples have no step map or no rewards")
        value_BS = likelihood.per_token(value_RS, views.weight_RS, views.sample_R, num)
        is_trained_BS = likelihood.per_token(views.is_target_RS, views.weight_RS, views.sample_R, num) > 0
        last_B1 = torch.where(is_trained_BS, step_BS, -1).amax(-1, keepdim=True)
        reward_BS = torch.where(is_trained_BS & (step_BS == last_B1), reward_B.double()[:, None], 0.0)
        gae = stepwise_gae(reward_BS, value_BS, step_BS, is_trained_BS, self.options.gamma, self.options.lam)
        return_BS, advantage_BS = gae
        return Judgement(value_BS.float(), return_BS.float(), advantage_BS.float())

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        advantage_RS = _judgement(samples).advantage_BS[views.sample_R].double()
        is_target_RS, new_RS = views.is_target_RS, logp_RS.double()
        item_RS, metrics = self.policy_loss(new_RS - old_RS, advantage_RS, is_target_RS)
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        if anchor_RS is not None:
            kl_RS, metrics["kl"] = self.kl_loss(new_RS - anchor_RS, is_target_RS)
            item_RS = item_RS + kl_RS
        metrics["token_advantage"] = reduce.metric(advantage_RS, is_target_RS)
        return Loss(self._aggregate(item_RS, views, samples), metrics)

    def value_loss(self, value_RS: Tensor, views: Views, samples: Samples) -> Loss:
        judgement, clip = _judgement(samples), self.options.value_clip
        old_RS = judgement.value_BS[views.sample_R].double()
        return_RS = judgement.return_BS[views.sample_R].double()
        new_RS = value_RS.double()
        clipped_RS = old_RS + (new_RS - old_RS).clamp(-clip, clip)
        error_RS, clipped_error_RS = (new_RS - return_RS).square(), (clipped_RS - return_RS).square()
        item_RS = torch.maximum(error_RS, clipped_error_RS) / 2
        metrics = {
            "value": reduce.metric(new_RS, views.is_target_RS),
            "return": reduce.metric(return_RS, views.is_target_RS),
            "squared_error": reduce.metric(error_RS, views.is_target_RS),
            "clip_fraction": reduce.metric(clipped_error_RS > error_RS, views.is_target_RS),
        }
        return Loss(self._aggregate(item_RS, views, samples), metrics)

    def _aggregate(self, item_RS: Tensor, views: Views, samples: Samples) -> Tensor:
        if self.options.variant == "clean":
            return reduce.masked_mean(item_RS, views.is_target_RS)
        longest = samples.canvas.is_completion_BS.sum(-1).max()
        total = torch.where(views.is_target_RS, item_RS, 0.0).sum()
        return reduce.divide(total, longest * views.num_views)


def _judgement(samples: Samples) -> Judgement:
    if samples.judgement is None:
        raise ValueError("these samples have not been judged by the critic")
    return samples.judgement
