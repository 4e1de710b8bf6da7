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
    "threshold",
    "factor",
    "entropy_bound",
]
DYNAMIC_POLICIES = ("threshold", "factor", "entropy_bound")  # commit as many as the rule allows, at least one


class Decode(Options):
    """Options of one denoising run.

    A fixed schedule (`steps_per_block`) spreads a block's masks evenly over its steps, the remainder first
    (LLaDA, `get_num_transfer_tokens`). The policies `threshold`, `factor` and `entropy_bound` decide by
    themselves how many tokens a step commits.
    """

    gen_length: int = Field(128, ge=1, description="completion positions; block models round up to whole blocks")
    block_length: int | None = Field(None, ge=1, description="positions denoised together; default: the family's")
    steps_per_block: int | None = Field(None, ge=1, description="fixed schedule; default: one token per step")
    unmask: UnmaskPolicy = Field("low_confidence", description="which masked positions a step commits")
    threshold: float | None = Field(
        None, ge=0.0, description="for unmask: threshold, confidence in (0, 1]; default 0.9"
    )
    min_commit: int | None = Field(None, ge=1, description="for unmask: threshold, fewest tokens a step commits")
    factor: float | None = Field(None, gt=0.0, description="for unmask: factor (Fast-dLLM); default 1.0")
    entropy_bound: float | None = Field(None, gt=0.0, description="for unmask: entropy_bound, nats; default 0.35")
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
    batch_size: int = Field(256, ge=1, description="sequences denoised together; never changes a completion")

    @property
    def is_dynamic(self) -> bool:
        """Whether the policy itself decides how many tokens a step commits."""
        return self.unmask in DYNAMIC_POLICIES

    @model_validator(mode="after")
    def _check(self) -> Decode:
        if self.is_dynamic and self.steps_per_block is not None:
            raise ValueError(
                f"unmask: {self.unmask} decides itself how many tokens a step commits, but steps_per_block is "
                f"{self.steps_per_block}; remove steps_per_block or choose a policy with a fixed schedule"
            )
        if self.remask == "rcr" and (self.is_dynamic or self.unmask in ("random", "left_to_right")):
            raise ValueError(
                f"remask: rcr ranks tokens by how sure the network was of them, on a fixed schedule, which "
                f"unmask: {self.unmask} does not do; use low_confidence, max_prob, entropy or margin"
            )
        for field, policy in (
            ("threshold", "threshold"),
            ("min_commit", "threshold"),
            ("factor", "factor"),
            ("entropy_bound", "entropy_bound"),
        ):
            if getattr(self, field) is not None and self.unmask != policy:
                raise ValueError(
                    f"{field} needs unmask: {policy}, got unmask: {self.unmask}; remove {field} or change unmask"
                )
        if self.threshold is not None and self.threshold > 1.0:
            raise ValueError(f"threshold is a probability, got {self.threshold}; choose a value in [0, 1]")
        if self.block_length is not None:
            self.check_block(self.block_length)
        return self

    def check_block(self, block_length: int) -> None:
        """Raise ValueError if the schedule cannot fill blocks of `block_length`."""
        if self.steps_per_block is not None and self.steps_per_block > block_length:
            raise ValueError(
                f"steps_per_block {self.steps_per_block} cannot fill a block of {block_length} positions: every step "
                f"commits at least one token; use steps_per_block <= {block_length}"
            )
