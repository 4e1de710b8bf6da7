"""How completions are generated: one schema for rollouts, evaluation, `generate` and the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dare.core.options import Options

UnmaskPolicy = Literal[
    "low_confidence",
    "max_prob",
    "entropy",
    "margin",
    "random",
    "left_to_right",
    "independent",
    "capped_threshold",
    "threshold",
    "factor",
    "entropy_bound",
]
ScheduleName = Literal["even", "timesteps", "carried", "ascending"]
Compat = Literal["sampled_scores", "eos_inside_block"]
_THRESHOLD_POLICIES = ("threshold", "capped_threshold")
_RANKED_POLICIES = ("low_confidence", "max_prob", "entropy", "margin")  # a quota of the best
DYNAMIC_POLICIES = ("threshold", "factor", "entropy_bound")  # commit as many as the rule allows, at least one


class Decode(Options):
    """Options of one denoising run.

    A fixed schedule (`steps_per_block`) spreads a block's masks over its steps, by default evenly, the remainder first
    (LLaDA, `get_num_transfer_tokens`). The policies `threshold`, `factor` and `entropy_bound` decide by
    themselves how many tokens a step commits.
    """

    gen_length: int = Field(128, ge=1, description="completion positions; block models round up to whole blocks")
    block_length: int | None = Field(None, ge=1, description="positions denoised together; default: the family's")
    steps_per_block: int | None = Field(
        None, ge=1, description="fixed schedule; default: one token per step, log2(block length) steps if ascending"
    )
    schedule: ScheduleName = Field(
        "even",
        description="even; timesteps: the share of the remaining masks that falls between two times, rounded down, so "
        "that some steps commit nothing and the last one the rest (Dream); carried: even, and what earlier steps left "
        "of theirs (for unmask: capped_threshold); ascending: 1, 2, 4, ... tokens, the last step the rest (ASS)",
    )
    t_min: float = Field(
        1e-3,
        gt=0.0,
        lt=1.0,
        description="for schedule: timesteps and unmask: independent, the last of the evenly spaced times (Dream: eps)",
    )
    unmask: UnmaskPolicy = Field("low_confidence", description="which masked positions a step commits")
    unmask_temperature: float = Field(
        0.0,
        ge=0.0,
        description="0: the positions of highest score; otherwise positions are drawn from softmax(score / this) "
        "without replacement (Dream: alg_temp)",
    )
    threshold: float | None = Field(
        None, ge=0.0, description="for unmask: threshold and capped_threshold, confidence in (0, 1]; default 0.9"
    )
    min_commit: int | None = Field(None, ge=1, description="for unmask: threshold, fewest tokens a step commits")
    factor: float | None = Field(None, gt=0.0, description="for unmask: factor (Fast-dLLM); default 1.0")
    entropy_bound: float | None = Field(None, gt=0.0, description="for unmask: entropy_bound, nats; default 0.35")
    edit_threshold: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="replace a committed token of the current block by a candidate of higher confidence than this "
        "(LLaDA2.1); default: tokens are final",
    )
    max_post_steps: int | None = Field(
        None, ge=0, description="for edit_threshold: most steps that go over a complete block; default 16"
    )
    remask: Literal["none", "rcr"] = Field(
        "none", description="rcr: mask the least confident tokens of the block again after every step (MDPO)"
    )
    temperature: float = Field(0.0, ge=0.0, description="0 = greedy")
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    cache: Literal["auto", "none", "prefix", "dual"] = Field(
        "auto", description="auto: exact block cache for block models, none for masked ones; prefix, dual: approximate"
    )
    cfg_scale: float = Field(0.0, ge=0.0, description="classifier-free guidance: u + (1 + w)(c - u)")
    eos_stop: bool | None = Field(
        None, description="stop after the block that holds an EOS; default: block models yes, masked models no"
    )
    forbid_eos: bool = Field(False, description="never produce an EOS token (LLaDA: logits_eos_inf)")
    zero_eos_confidence: bool = Field(
        False, description="EOS keeps its logit but is committed last (LLaDA: confidence_eos_eot_inf)"
    )
    eos_discount: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="an EOS candidate counts as less sure early in a block: its confidence is multiplied by a factor "
        "that rises from this to 1 over the block's steps (EOSER; published: 0.4, with schedule: ascending 0.01)",
    )
    compat: tuple[Compat, ...] = Field(
        (),
        description="published behaviour that is not the default. sampled_scores: positions are ranked by the "
        "distribution that is sampled (temperature, top-k, top-p), not by the network's own (Dream, SDAR, LLaDA2.x). "
        "eos_inside_block: eos_stop ends a row as soon as an EOS is committed with nothing masked before it, the rest "
        "of its block left masked (LLaDA2.0, eos_early_stop)",
    )
    batch_size: int = Field(256, ge=1, description="sequences denoised together; never changes a completion")

    @property
    def is_dynamic(self) -> bool:
        """Whether the policy itself decides how many tokens a step commits."""
        return self.unmask in DYNAMIC_POLICIES

    @property
    def has_empty_steps(self) -> bool:
        """Whether a step may commit nothing, so that there may be more steps than positions."""
        return self.schedule == "timesteps" or self.unmask == "independent"

    @model_validator(mode="after")
    def _check(self) -> Decode:
        if self.is_dynamic and self.steps_per_block is not None:
            raise ValueError(
                f"unmask: {self.unmask} decides itself how many tokens a step commits, but steps_per_block is "
                f"{self.steps_per_block}; remove steps_per_block or choose a policy with a fixed schedule"
            )
        if self.is_dynamic and self.schedule != "even":
            raise ValueError(f"unmask: {self.unmask} has no schedule, got schedule: {self.schedule}; remove schedule")
        if self.schedule == "carried" and self.unmask != "capped_threshold":
            raise ValueError(
                f"schedule: carried needs unmask: capped_threshold, got unmask: {self.unmask}: every other policy "
                "commits all that it may; change one of them"
            )
        if self.t_min != type(self).model_fields["t_min"].default and not self.has_empty_steps:
            raise ValueError(
                f"t_min needs schedule: timesteps or unmask: independent, got schedule: {self.schedule}, unmask: "
                f"{self.unmask}; remove t_min"
            )
        if self.unmask_temperature and self.unmask not in _RANKED_POLICIES:
            raise ValueError(
                f"unmask_temperature draws a quota of positions by their score, got unmask: {self.unmask}; use "
                f"{', '.join(_RANKED_POLICIES)}, or set unmask_temperature: 0"
            )
        if "eos_inside_block" in self.compat and (self.eos_stop is False or self.edit_threshold is not None):
            raise ValueError(
                "compat: eos_inside_block is a way to stop at an EOS, and a token that may be edited has not stopped "
                "anything; remove it, or remove eos_stop: false and edit_threshold"
            )
        self._check_remask()
        if self.eos_discount is not None and self.unmask not in ("low_confidence", "capped_threshold"):
            raise ValueError(
                "eos_discount changes how sure a sampled EOS counts, step by step of a fixed schedule, got unmask: "
                f"{self.unmask}; use low_confidence"
            )
        for field, policies in (
            ("threshold", _THRESHOLD_POLICIES),
            ("min_commit", ("threshold",)),
            ("factor", ("factor",)),
            ("entropy_bound", ("entropy_bound",)),
        ):
            if getattr(self, field) is not None and self.unmask not in policies:
                raise ValueError(
                    f"{field} needs unmask: {' or '.join(policies)}, got unmask: {self.unmask}; remove {field} or "
                    "change unmask"
                )
        if self.max_post_steps is not None and self.edit_threshold is None:
            raise ValueError("max_post_steps needs edit_threshold; remove it or set edit_threshold, for example to 0.5")
        if self.threshold is not None and self.threshold > 1.0:
            raise ValueError(f"threshold is a probability, got {self.threshold}; choose a value in [0, 1]")
        if self.block_length is not None:
            self.check_block(self.block_length)
        return self

    def _check_remask(self) -> None:
        if self.remask == "none":
            return
        if self.is_dynamic or self.schedule != "even" or self.unmask in ("random", "left_to_right", "independent"):
            raise ValueError(
                f"remask: {self.remask} ranks tokens by how sure the network was of them, on the even schedule, got "
                f"unmask: {self.unmask}, schedule: {self.schedule}; use low_confidence, max_prob, entropy or margin"
            )
        if "eos_inside_block" in self.compat:
            raise ValueError(f"remask: {self.remask} may take an EOS back; remove compat: eos_inside_block")
        if self.unmask_temperature:
            raise ValueError(
                f"remask: {self.remask} keeps the tokens of highest score, unmask_temperature draws them; remove one"
            )
        if self.edit_threshold is not None:
            raise ValueError(
                f"remask: {self.remask} masks tokens again and edit_threshold replaces them; remove one of them"
            )

    def check_block(self, block_length: int) -> None:
        """Raise ValueError if the schedule cannot fill blocks of `block_length`."""
        if self.steps_per_block is not None and self.steps_per_block > block_length and not self.has_empty_steps:
            raise ValueError(
                f"steps_per_block {self.steps_per_block} cannot fill a block of {block_length} positions: every step "
                f"commits at least one token; use steps_per_block <= {block_length}"
            )
