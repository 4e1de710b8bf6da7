"""What online algorithms share: advantages of a group, the clipped loss with its metrics, ELBO ratios, trace replay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from dare.algorithms.base import Algorithm
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.lazy import torch
from dare.core.options import Options
from dare.core.types import Loss, Metric, Samples, Views
from dare.diffusion import likelihood
from dare.objectives import reduce
from dare.objectives.advantage import AdvantageRule, compute_advantages
from dare.objectives.kl import KLEstimator, estimate_kl
from dare.objectives.surrogate import CLIP_PRESETS, ClipPreset, clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor

Advantage = Annotated[AdvantageRule, Field(description="how rewards of a group become advantages")]
Epsilon = Annotated[float, Field(ge=0.0, lt=1.0, description="the ratio is clipped to [1 - eps, 1 + eps_high]")]
Beta = Annotated[float, Field(ge=0.0, description="weight of the KL; 0 needs no reference")]
KL = Annotated[KLEstimator, Field(description="estimator of the KL")]
KLTarget = Annotated[
    Literal["reference", "old", "rollout"],
    Field(
        description="whom the KL is measured to: the frozen policy, the one before the rollout's updates, or what the "
        "rollout recorded at each commit (algorithms that replay it)"
    ),
]
Tail = Annotated[
    Literal["scored", "keep_masked"],
    Field(description="positions after the first EOS: part of the likelihood, or always masked and not scored"),
]
RatioNorm = Annotated[
    Literal["length", "none"], Field(description="what the sequence's log-ratio is divided by: its tokens, or nothing")
]


class GroupOptions(Options):
    """Every algorithm gives the advantage its own default."""

    advantage: Advantage
    score_temperature: Literal["rollout", "one"] = Field(
        "rollout",
        description="temperature of the scored log-probs: that of the rollout, so that the ratio is its own, or 1",
    )


class PolicyOptions(GroupOptions):
    """Every algorithm gives the advantage and the first three their own defaults."""

    eps: Epsilon
    beta: Beta
    kl: KL
    eps_high: float | None = Field(None, ge=0.0, description="upper clip; default: eps")
    clip: ClipPreset | None = Field(
        None,
        description="a published interval in the place of eps and eps_high. clip_higher: [1 - 0.2, 1 + 0.28] (DAPO); "
        "gspo: [1 - 3e-4, 1 + 4e-4], for ratios of sequences",
    )
    dual_clip: float | None = Field(None, gt=1.0, description="cap of the ratio where the advantage is negative")
    kl_to: KLTarget = "reference"

    @property
    def clip_interval(self) -> tuple[float, float]:
        """How far a ratio may fall below 1, and rise above it, before it is clipped."""
        if self.clip is not None:
            return CLIP_PRESETS[self.clip]
        return self.eps, self.eps if self.eps_high is None else self.eps_high


class TraceOptions(PolicyOptions):
    ratio: Literal["token", "step", "sequence"] = Field(
        "token",
        description="what is clipped together: a token, the tokens that a view scores (one denoising step), or all of "
        "a sample; the ratios of the latter are geometric means over their tokens",
    )
    old: Literal["scored", "rollout"] = Field(
        "scored",
        description="old log-probs: scored again by the trainer, or those that the rollout recorded at each commit",
    )
    rollout_cap: float | None = Field(
        None,
        ge=1.0,
        description="weigh tokens by min(old / rollout probability, cap), for rollouts of another engine; default: no",
    )


GroupOptionsT = TypeVar("GroupOptionsT", bound=GroupOptions)
PolicyOptionsT = TypeVar("PolicyOptionsT", bound=PolicyOptions)
TraceOptionsT = TypeVar("TraceOptionsT", bound=TraceOptions)


class GroupAlgorithm(Algorithm[GroupOptionsT]):
    """An online algorithm that compares the completions of a prompt."""

    kind: ClassVar[Literal["online", "offline"]] = "online"

    def advantages(self, reward_B: Tensor, group_B: Tensor) -> Tensor:
        return compute_advantages(self.options.advantage, reward_B, group_B)

    def temperature(self, samples: Samples) -> float:
        """What the views' logits are divided by."""
        return samples.rollout_temperature if self.options.score_temperature == "rollout" else 1.0


class PolicyAlgorithm(GroupAlgorithm[PolicyOptionsT]):
    """An online algorithm whose loss is -clipped surrogate + beta * KL, per token or per sequence."""

    @property
    def needs_reference(self) -> bool:
        return self.options.beta > 0 and self.options.kl_to == "reference"

    def check_rollouts(self, decode: Decode) -> list[str]:
        if self.options.kl_to == "rollout" and not self.needs_step_map:
            raise DareError(
                "only algorithms that replay the rollout score what it recorded at each commit",
                where="algorithm.kl_to",
                got="rollout",
                expected="reference or old",
                fix="set kl_to: old, or choose cj_grpo, tracerl or agrpo",
            )
        return super().check_rollouts(decode)

    def anchor(self, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples) -> Tensor | None:
        """The log-probs [R, S] of the policy that the KL is measured to; None without a KL."""
        if self.options.beta == 0:
            return None
        return old_RS if self.options.kl_to == "old" else reference_RS

    def policy_loss(
        self, log_ratio: Tensor, advantage: Tensor, is_item: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """-clipped surrogate of each item (a token or a sequence), and metrics over `is_item` (default: all)."""
        interval, dual_clip = self.options.clip_interval, self.options.dual_clip
        objective, is_clipped = clipped_surrogate(log_ratio, advantage, *interval, dual_clip)
        metrics = {
            "ratio": reduce.metric(log_ratio.detach().exp(), is_item),
            "clip_fraction": reduce.metric(is_clipped, is_item),
        }
        return -objective, metrics

    def kl_loss(self, difference: Tensor, is_item: Tensor | None = None) -> tuple[Tensor, Metric]:
        """beta * KL of each item from log policy - log anchor, and the KL's mean over `is_item`."""
        kl = estimate_kl(self.options.kl, difference)
        return self.options.beta * kl, reduce.metric(kl, is_item)

    def token_loss(
        self, new: Tensor, old: Tensor, anchor: Tensor | None, advantage: Tensor, is_scored: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Both terms of each token: log-probs [*, S] under three policies, advantages of rows [*]."""
        item, metrics = self.policy_loss(new - old, advantage.double()[:, None], is_scored)
        if anchor is not None:
            kl, metrics["kl"] = self.kl_loss(new - anchor, is_scored)
            item = item + kl
        return item, metrics

    def elbo_loss(
        self,
        logp_RS: Tensor,
        old_RS: Tensor,
        reference_RS: Tensor | None,
        views: Views,
        samples: Samples,
        *,
        length_B: Tensor,
        ratio_norm: Literal["length", "none"],
        kl_norm: Literal["length", "none"],
    ) -> Loss:
        """The mean over samples of -PPO(exp(ELBO - ELBO_old), A) + beta KL(ELBO - ELBO_anchor).

        ELBO: the weighted sum over a sample's views. `length_B` (tokens in the likelihood) divides the log-ratio, and
        the KL of the undivided difference, where the norm says so.
        """

        def elbo(view_logp_RS: Tensor) -> Tensor:
            return likelihood.per_sequence(view_logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)

        new_B = elbo(logp_RS)
        log_ratio_B = new_B - elbo(old_RS)
        if ratio_norm == "length":
            log_ratio_B = reduce.divide(log_ratio_B, length_B)
        loss_B, metrics = self.policy_loss(log_ratio_B, samples.advantage_B.double())
        metrics["elbo_per_token"] = reduce.metric(reduce.divide(new_B, length_B))
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        if anchor_RS is not None:
            kl_B, metrics["kl"] = self.kl_loss(new_B - elbo(anchor_RS))
            loss_B = loss_B + (reduce.divide(kl_B, length_B) if kl_norm == "length" else kl_B)
        return Loss(reduce.mean(loss_B), metrics)


class TraceAlgorithm(PolicyAlgorithm[TraceOptionsT]):
    """A policy algorithm on the log-probs of the steps that the rollout took.

    What the rollout recorded at a commit is the log-prob that the trainer would score there, so with `old: rollout` a
    rollout that is used more than once costs no scoring pass for the old policy. Condition: the same quantity, which
    approximate caches, guidance, shrunk traces and another scoring temperature break (DareError).
    """

    needs_step_map: ClassVar[bool] = True

    @property
    def needs_old(self) -> bool:
        return self.options.old == "scored"

    def check_rollouts(self, decode: Decode) -> list[str]:
        if self.reads_recorded:
            if self.options.score_temperature != "rollout":
                raise self._not_the_same("algorithm.score_temperature", self.options.score_temperature, "rollout")
            if decode.cache in ("prefix", "dual"):
                raise self._not_the_same("decode.cache", decode.cache, "auto or none")
            if decode.cfg_scale != 0.0:
                raise self._not_the_same("decode.cfg_scale", decode.cfg_scale, 0.0)
        return super().check_rollouts(decode)

    @property
    def reads_recorded(self) -> bool:
        options = self.options
        return options.old == "rollout" or options.rollout_cap is not None or options.kl_to == "rollout"

    def trace_loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> tuple[Tensor, dict[str, Metric]]:
        """-clipped surrogate + beta KL of each token [R, S], and metrics."""
        old_RS = self.old_logp(old_RS, views, samples)
        new_RS, is_scored_RS = logp_RS.double(), views.is_target_RS
        advantage_RS = self.token_advantages(old_RS, views, samples)
        item_RS, metrics = self.policy_loss(self.log_ratio(new_RS - old_RS, views), advantage_RS, is_scored_RS)
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        if anchor_RS is not None:
            kl_RS, metrics["kl"] = self.kl_loss(new_RS - anchor_RS, is_scored_RS)
            item_RS = item_RS + kl_RS
        return item_RS, metrics

    def log_ratio(self, log_ratio_RS: Tensor, views: Views) -> Tensor:
        """The tokens' log-ratios [R, S], each replaced by the mean of those that are clipped together with it.

        The gradient on policy is that of token ratios: n tokens share a mean to which each contributes 1 / n.
        """
        if self.options.ratio == "token":
            return log_ratio_RS
        view_R = torch.arange(views.num_views, device=views.sample_R.device)
        group_R = view_R if self.options.ratio == "step" else views.sample_R
        zero_G = torch.zeros(views.num_views, dtype=log_ratio_RS.dtype, device=log_ratio_RS.device)
        scored_RS = torch.where(views.is_target_RS, log_ratio_RS, 0.0)
        total_G = zero_G.index_add(0, group_R, scored_RS.sum(-1))
        count_G = zero_G.index_add(0, group_R, views.is_target_RS.sum(-1).to(zero_G.dtype))
        return reduce.divide(total_G, count_G)[group_R, None].expand_as(log_ratio_RS)

    def anchor(self, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples) -> Tensor | None:
        if self.options.beta > 0 and self.options.kl_to == "rollout":
            return self._recorded(views, samples)
        return super().anchor(old_RS, reference_RS, views, samples)

    def old_logp(self, old_RS: Tensor, views: Views, samples: Samples) -> Tensor:
        """[R, S]: `old_RS`, or the log-probs recorded at each commit. Raises DareError if there are none."""
        if self.options.old == "scored":
            return old_RS
        return self._recorded(views, samples)

    def token_advantages(self, old_RS: Tensor, views: Views, samples: Samples) -> Tensor:
        """float64 [R, S]: the sample's advantage, with `rollout_cap` times the truncated importance weight.

        The weight min(p_old / p_rollout, cap) corrects for a rollout engine whose numbers are not the trainer's (Yao
        et al. 2025); it carries no gradient. Raises DareError if no rollout log-probs were recorded.
        """
        advantage_R1 = samples.advantage_B.double()[views.sample_R, None]
        if self.options.rollout_cap is None:
            return advantage_R1.expand(old_RS.shape)
        gap_RS = (old_RS.double() - self._recorded(views, samples)) * views.is_target_RS
        return advantage_R1 * gap_RS.clamp(max=math.log(self.options.rollout_cap)).exp()

    def _recorded(self, views: Views, samples: Samples) -> Tensor:
        if samples.rollout_logp_BS is None:
            raise self._not_the_same("rollout log-probs", "none", "recorded at each commit")
        return samples.rollout_logp_BS[views.sample_R] * views.is_target_RS

    def _not_the_same(self, where: str, got: object, expected: object) -> DareError:
        return DareError(
            "the rollout's log-probs are not those that the trainer scores",
            where=where,
            got=got,
            expected=expected,
            fix="set algorithm.old: scored, kl_to: reference or old, without rollout_cap",
        )
