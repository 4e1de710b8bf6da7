"""Supervised fine-tuning of every family: one loss with orthogonal settings, the published objectives as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dare.algorithms.base import Algorithm
from dare.algorithms.sft_presets import PRESETS, Norm, Objective, PresetName
from dare.core.errors import DareError
from dare.core.lazy import torch
from dare.core.options import Options
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Loss, Samples, Views
from dare.diffusion import likelihood, supervised
from dare.diffusion.corrupt import TimeSpread
from dare.diffusion.schedule import ScheduleName
from dare.diffusion.supervised import Noise, NumMasked, Weighting
from dare.objectives import reduce
from dare.objectives.entropy import entropy

if TYPE_CHECKING:
    from torch import Tensor

_UNKNOWN = -1  # no prediction was asked for


class SFTOptions(Options):
    """Whatever is null is as the preset says."""

    preset: PresetName | Literal["auto"] = Field(
        "auto",
        description="a published objective, whose settings the others override; auto: that of the family",
    )
    schedule: ScheduleName | None = Field(None, description="mask probability and ELBO weight as functions of t")
    t_min: float | None = Field(
        None, gt=0.0, lt=1.0, description="lowest t; bounds the ELBO weight, by about 1 / t_min if schedule is linear"
    )
    t_max: float | None = Field(None, gt=0.0, le=1.0, description="highest t; below 1 the loss is no bound any more")
    time_per: Literal["block", "sample"] | None = Field(
        None, description="block models: one t per block, or one per sample"
    )
    time_spread: TimeSpread | None = Field(
        None, description="noise levels kept apart: those of a sample's views, also those of its blocks, or none"
    )
    weight: Weighting | None = Field(
        None,
        description="of a masked token's loss. elbo: w(t); uniform: 1; one_minus_t; cart: by its distance to visible "
        "tokens",
    )
    cart_p: float | None = Field(None, gt=0.0, lt=1.0, description="cart: how fast the influence decays with distance")
    norm: Norm | None = Field(
        None,
        description="sequence: mean over samples of the mean per token; token: mean per token; batch: per sample; "
        "masked: mean per masked token; view: mean over views of the mean per masked token; constant: per sample and "
        "norm_length tokens",
    )
    norm_length: int | None = Field(None, ge=1, description="norm constant: tokens that every sample counts as")
    num_masked: NumMasked | None = Field(
        None,
        description="random: each token by itself; exact: ceil(p n) of a unit's n tokens; rounded: round(p n), later "
        "ones likelier (NeMo; no bound)",
    )
    views_per_sample: int | None = Field(None, ge=1, description="masks per sample; their loss is averaged")
    is_complementary: bool | None = Field(None, description="views come in pairs of a mask and its complement")
    is_eos_unit: bool | None = Field(None, description="the EOS tokens that end a row are masked all or none")
    is_rate_kept: bool | None = Field(
        None, description="masks whose realised share leaves [t_min, t_max] are drawn again; the loss is no bound then"
    )
    focal_gamma: float | None = Field(
        None, ge=1.0, description="loss of a token times focal_alpha (1 - p)^gamma; default: off"
    )
    focal_alpha: float | None = Field(None, gt=0.0, description="the constant beside focal_gamma")
    confidence_weight: float | None = Field(
        None,
        ge=0.0,
        description="weight of the mean entropy at masked tokens predicted right (one more forward)",
    )
    edit_rate: float | None = Field(
        None, ge=0.0, lt=1.0, description="share of visible tokens that are replaced; all visible ones are then scored"
    )
    edit_weight: float | None = Field(None, gt=0.0, description="weight of a visible token's loss, where it is scored")
    draft_turns: int | None = Field(
        None, ge=0, le=4, description="further views that show the model's own guesses instead of masks, one per turn"
    )
    block_schedule: list[tuple[float, int]] | None = Field(
        None,
        description="block models: [share of the run, block length from there on], from share 0; default: one length",
    )

    @field_validator("block_schedule")
    @classmethod
    def _check_schedule(cls, schedule: list[tuple[float, int]] | None) -> list[tuple[float, int]] | None:
        if not schedule:
            return schedule
        shares = [share for share, _ in schedule]
        if shares[0] != 0.0 or shares != sorted(set(shares)) or shares[-1] >= 1.0:
            raise ValueError(f"shares must rise from 0 and stay below 1, got {shares}")
        if any(length < 1 for _, length in schedule):
            raise ValueError("a block has at least one position")
        return schedule

    @model_validator(mode="after")
    def _check(self) -> SFTOptions:
        problem = self.problem(self.objective())
        if problem is not None:
            raise ValueError(problem)
        return self

    def objective(self, default: str = "llada") -> Objective:
        """Every setting decided: what is given, else the preset's (`default` where it is auto)."""
        preset = default if self.preset == "auto" else self.preset
        given = {name: value for name, value in self.model_dump(exclude={"preset"}).items() if value is not None}
        settings: dict[str, Any] = {**PRESETS[preset], **given}
        if "views_per_sample" in settings:
            settings["num_views"] = settings.pop("views_per_sample")
        if "block_schedule" in settings:
            settings["block_schedule"] = tuple(tuple(entry) for entry in settings["block_schedule"])
        of_noise = {f.name for f in fields(Noise)} & settings.keys()
        noise = Noise(**{name: settings.pop(name) for name in of_noise})
        return Objective(noise=noise, **settings)

    def decided(self, default: str) -> SFTOptions:
        """The same objective with every setting spelt out, for the record.

        Raises DareError if the settings do not fit those of the preset `default`.
        """
        objective = self.objective(default)
        problem = self.problem(objective)
        if problem is not None:
            raise DareError(problem, where="algorithm", got=f"preset {default}")
        noise = {name: value for name, value in dataclasses.asdict(objective.noise).items() if name != "vocab_size"}
        noise["views_per_sample"] = noise.pop("num_views")
        rest = {f.name: getattr(objective, f.name) for f in fields(objective) if f.name != "noise"}
        rest["block_schedule"] = [list(entry) for entry in objective.block_schedule]
        preset = default if self.preset == "auto" else self.preset
        return SFTOptions.model_validate({"preset": preset, **noise, **rest})

    @staticmethod
    def problem(objective: Objective) -> str | None:
        """What is wrong with the combination of settings, if anything is."""
        noise = objective.noise
        if noise.t_min > noise.t_max:
            return f"t_min {noise.t_min} is above t_max {noise.t_max}; exchange them"
        if (objective.norm == "constant") != (objective.norm_length is not None):
            return f"norm_length goes with norm: constant, got norm {objective.norm} and {objective.norm_length}"
        if noise.num_masked != "random" and (noise.is_complementary or noise.is_eos_unit or noise.is_rate_kept):
            return (
                f"num_masked: {noise.num_masked} fixes how many tokens are masked; it goes without is_complementary, "
                "is_eos_unit and is_rate_kept"
            )
        if not noise.is_complementary:
            return None
        if noise.schedule != "linear":
            return f"is_complementary needs schedule: linear, got {noise.schedule}; change one of them"
        if noise.num_views % 2:
            return f"is_complementary needs an even views_per_sample, got {noise.num_views}; use 2"
        if noise.t_min >= 0.5:
            return f"is_complementary needs t_min below 0.5, got {noise.t_min}: the complement's t is 1 - t"
        return None


class SFT(Algorithm[SFTOptions]):
    """Scored tokens are masked with probability p = 1 - alpha(t); the loss is a weighted sum of their nll over `norm`.

    With preset llada p = (1 - eps) t + eps and the loss is mean_b (1 / L_b) sum nll / p; L_b counts the scored tokens
    of sample b, so its expectation is -ELBO / L. A view in which nothing is masked contributes 0: redrawing it, as
    SDAR does, would bias short samples. Denominators are those of the whole batch. docs/sft.md says which preset
    reproduces which paper, and where ours differs from public code.
    """

    Config = SFTOptions
    kind: ClassVar[Literal["online", "offline"]] = "offline"

    def __init__(self, options: SFTOptions, *, vocab_size: int | None = None) -> None:
        super().__init__(options)
        objective = options.objective()
        self.objective = dataclasses.replace(
            objective, noise=dataclasses.replace(objective.noise, vocab_size=vocab_size)
        )
        self.is_linear = objective.focal_gamma is None

    def adapted(self, spec: FamilySpec) -> SFT:
        return SFT(self.options.decided(spec.sft_preset), vocab_size=spec.vocab_size)

    @property
    def num_predictions(self) -> int:
        is_confidence_trained = self.objective.confidence_weight > 0
        return max(self.objective.draft_turns, int(is_confidence_trained))

    def block_length(self, progress: float) -> int | None:
        lengths = [length for share, length in self.objective.block_schedule if share <= progress]
        return lengths[-1] if lengths else None

    def corrupt(self, samples: Samples, key: Key) -> Views:
        return supervised.noised(samples, key, self.objective.noise)

    def with_predictions(self, views: Views, samples: Samples, token_RS: Tensor) -> Views:
        """The views, the last turn's masks and drafts guessed anew in views of their own.

        A draft view shows the guesses of the view before it; its targets are what that view had to find, right or
        wrong, with weight 1 (LLaDA2.1's multi-turn forward).
        """
        known_RS = views.predicted_RS
        turn_R = torch.zeros_like(views.view_R) if known_RS is None else views.view_R // self.objective.noise.num_views
        latest = int(turn_R.max())
        if known_RS is None:
            known_RS = torch.where(views.is_target_RS, token_RS, _UNKNOWN)
        views = dataclasses.replace(views, predicted_RS=known_RS)
        if latest >= self.objective.draft_turns:
            return views
        drafted = views.rows(turn_R == latest)
        guess_RS = token_RS[turn_R == latest]
        is_guessed_RS = drafted.is_target_RS
        num_views = self.objective.noise.num_views
        drafted = dataclasses.replace(
            drafted,
            noisy_RS=torch.where(is_guessed_RS, guess_RS, drafted.noisy_RS),
            weight_RS=is_guessed_RS.float() * self.objective.noise.edit_weight / num_views,
            view_R=drafted.view_R + num_views,
            predicted_RS=torch.full_like(guess_RS, _UNKNOWN),
        )
        return _sample_major(views, drafted)

    def auxiliary(self, views: Views, samples: Samples) -> AuxLoss | None:
        """The mean entropy where a mask is predicted right (CAP, LLaDA2.0; dParallel): certainty, so fewer steps."""
        weight = self.objective.confidence_weight
        if weight == 0 or views.predicted_RS is None:
            return None
        is_mask_RS = views.is_target_RS & (views.noisy_RS == samples.mask_id)
        view_A, position_A = (is_mask_RS & (views.predicted_RS == views.target_RS)).nonzero(as_tuple=True)
        if not len(view_A):
            return None
        scale = weight / len(view_A)

        def term(logits_CV: Tensor, entry_C: Tensor) -> Tensor:
            return scale * entropy(logits_CV)

        return AuxLoss(view_A, position_A, term, "confidence")

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        value = self._value(self._focused(logp_RS, views), views, samples)
        is_masked_RS = views.is_target_RS & (views.noisy_RS == samples.mask_id)
        is_candidate_RS = samples.is_scored_BS[views.sample_R]
        metrics = {
            "nll_masked": reduce.metric(-logp_RS, is_masked_RS),
            "mask_ratio": reduce.metric(is_masked_RS, is_candidate_RS),
            "has_mask": reduce.metric(torch.any(is_masked_RS, -1)),
        }
        is_visible_RS = views.is_target_RS & ~is_masked_RS
        if bool(is_visible_RS.any()):
            metrics["nll_visible"] = reduce.metric(-logp_RS, is_visible_RS)
        return Loss(value, metrics)

    def _value(self, logp_RS: Tensor, views: Views, samples: Samples) -> Tensor:
        """0-d: the weighted nll over the denominator that `norm` names."""
        norm, num_views = self.objective.norm, self.objective.noise.num_views
        if norm == "view":
            nll_R = -likelihood.per_view(logp_RS, views.weight_RS) * num_views
            num_targets_R = views.is_target_RS.sum(-1)
            return reduce.masked_mean(reduce.divide(nll_R, num_targets_R), num_targets_R > 0)
        nll_B = -likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)
        length_B = samples.is_scored_BS.sum(-1)
        if norm == "sequence":
            return reduce.mean(reduce.divide(nll_B, length_B))
        if norm == "token":
            return reduce.divide(nll_B.sum(), length_B.sum())
        if norm == "batch":
            return reduce.mean(nll_B)
        if norm == "constant":
            return reduce.mean(reduce.divide(nll_B, torch.full_like(length_B, self.objective.norm_length or 1)))
        return reduce.divide(nll_B.sum() * num_views, views.is_target_RS.sum())

    def _focused(self, logp_RS: Tensor, views: Views) -> Tensor:
        """Log-probs times focal_alpha (1 - p)^gamma, where that is on (Dream's token reweighting)."""
        gamma = self.objective.focal_gamma
        if gamma is None:
            return logp_RS
        miss_RS = torch.where(views.is_target_RS, -torch.expm1(logp_RS.double().clamp(max=0.0)), 1.0)
        return logp_RS * self.objective.focal_alpha * miss_RS.pow(gamma)


def _sample_major(first: Views, second: Views) -> Views:
    """Both, by sample, the first's views before the second's."""
    changes: dict[str, Any] = {
        f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)])
        for f in fields(Views)
        if f.name != "temperature"
    }
    both = dataclasses.replace(first, **changes)
    return both.rows(both.sample_R.argsort(stable=True))
