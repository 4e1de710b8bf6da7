"""MDPO (He et al. 2025, "MDPO: Overcoming the training-inference divide of masked diffusion language models")."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import Drafts, Loss, Record, Samples, Views
from dare.diffusion.trace import is_eos
from dare.objectives import reduce
from dare.objectives.advantage import compute_advantages
from dare.objectives.stepwise import draft_gains

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-4


class MDPOOptions(PolicyOptions):
    advantage: Advantage = "std4"
    eps: Epsilon = 0.2
    beta: Beta = 0.02
    kl: KL = "k2"
    top_steps: int = Field(8, ge=1, description="denoising steps trained: those with the largest sum of |advantage|")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: every draft weighs the same; faithful: weights of the public code"
    )


class MDPO(PolicyAlgorithm[MDPOOptions]):
    """One view per sample and chosen denoising step: the canvas that the step read, scoring its whole draft.

    Every step's draft (candidates at all masks, committed or not) has been rewarded as a completion. A step's gain
    (`objectives.stepwise.draft_gains`) is compared with the same step of the other samples of the group; the
    `top_steps` steps with the largest sum of |advantage| over the whole batch are trained. Ratio and KL per token.

    Drafts hold what was read, so replay is exact under `decode.remask: rcr` too (running confidence remasking, the
    paper's decoding). As all candidates are scored, the likelihood of a draft is exact whatever the unmask policy.

    clean     tokens through the draft's first EOS; confidence-weighted policy term, token mean within a draft; plain
              KL; mean over drafts
    faithful  all masked positions; per step the sum of c (-lambda PPO + beta k2) over the step's masked positions in
              the batch, over their number + 1e-4, with c the probability the candidate was drawn with and lambda =
              L / (masks of the draft + 1e-4), so late steps weigh more; mean over steps. The public code steps on each
              separately, chooses per group, adds a float32 epsilon to the temperature and drops slot 0 on Dream

    Samples need `drafts`; `advantage_B` is not used.
    """

    Config = MDPOOptions
    compares_rewards: ClassVar[bool] = True
    needs: ClassVar[frozenset[Record]] = frozenset({"drafts"})

    def step_advantages(self, samples: Samples) -> Tensor:
        """float32 [D]: of each draft, within its group and step."""
        drafts = _drafts(samples)
        gain_D = draft_gains(drafts.reward_D, drafts.sample_D, drafts.step_D)
        group_D = samples.group_B[drafts.sample_D] * (int(drafts.step_D.max()) + 1) + drafts.step_D
        return compute_advantages(self.options.advantage, gain_D, group_D)

    def corrupt(self, samples: Samples, key: Key) -> Views:
        drafts = _drafts(samples)
        index_R = self._chosen(samples)
        sample_R, seen_RS, draft_RS = drafts.sample_D[index_R], drafts.seen_DS[index_R], drafts.draft_DS[index_R]
        is_completion_RS = samples.canvas.is_completion_BS[sample_R]
        is_target_RS = (seen_RS == samples.mask_id) & (draft_RS != samples.mask_id) & is_completion_RS
        if self.options.variant == "clean":
            is_eos_RS = (is_eos(draft_RS, samples.eos_ids) & is_completion_RS).long()
            is_target_RS = is_target_RS & (is_eos_RS.cumsum(-1) == is_eos_RS)
        return Views(
            noisy_RS=seen_RS,
            context_RS=samples.canvas.input_BS[sample_R],  # all that blocks before the current one still are
            target_RS=draft_RS,
            is_target_RS=is_target_RS,
            weight_RS=torch.where(is_target_RS, drafts.logp_DS[index_R].exp(), 0.0),
            sample_R=sample_R,
            view_R=drafts.step_D[index_R],
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        advantage_R = self.step_advantages(samples)[self._chosen(samples)].double()
        is_target_RS, confidence_RS = views.is_target_RS, views.weight_RS.double()
        new_RS = logp_RS.double()
        item_RS, metrics = self.policy_loss(new_RS - old_RS, advantage_R[:, None], is_target_RS)
        kl_RS = torch.zeros_like(new_RS)
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        if anchor_RS is not None:
            kl_RS, metrics["kl"] = self.kl_loss(new_RS - anchor_RS, is_target_RS)
        if self.options.variant == "clean":
            token_RS = item_RS * confidence_RS + kl_RS
            row_R1 = torch.arange(views.num_views)[:, None]
            return Loss(reduce.mean_of_means(token_RS, is_target_RS, row_R1, views.num_views), metrics)
        is_completion_RS = samples.canvas.is_completion_BS[views.sample_R]
        num_masked_R1 = ((views.noisy_RS == samples.mask_id) & is_completion_RS).sum(-1, keepdim=True)
        scale_R1 = is_completion_RS.sum(-1, keepdim=True) / (num_masked_R1 + _SMALL)
        token_RS = torch.where(is_target_RS, (item_RS * scale_R1 + kl_RS) * confidence_RS, 0.0)
        _, step_R = torch.unique(views.view_R, return_inverse=True)
        zero_T = torch.zeros(int(step_R.max()) + 1, dtype=torch.float64)
        total_T = zero_T.index_add(0, step_R, token_RS.sum(-1))
        count_T = zero_T.index_add(0, step_R, is_target_RS.sum(-1).double())
        return Loss(reduce.mean(reduce.divide(total_T, count_T + _SMALL)), metrics)

    def _chosen(self, samples: Samples) -> Tensor:
        """int64 [R]: the drafts that are trained, in their own order: whole steps, chosen over the whole batch."""
        step_D = _drafts(samples).step_D
        weight_D = self.step_advantages(samples).double().abs()
        weight_T = torch.zeros(int(step_D.max()) + 1, dtype=torch.float64).index_add(0, step_D, weight_D)
        step_K = weight_T.argsort(descending=True, stable=True)[: self.options.top_steps]
        return torch.isin(step_D, step_K).nonzero()[:, 0]


def _drafts(samples: Samples) -> Drafts:
    if samples.drafts is None:
        raise ValueError("these samples have no drafts: the rollout did not record them")
    return samples.drafts
