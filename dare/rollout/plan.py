"""Decode options resolved for one family, with everything refused that cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.diffusion.unmask import find_policy, is_first_forced
from dare.families.base import Family
from dare.rollout.heap import kept_heap

_MAX_POST_STEPS = 16
_MIN_STEPS_TO_PACK = 8  # packing weights takes as long as a few steps save

CacheName = Literal["none", "prefix", "dual", "block"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does, without a choice left open."""

    decode: Decode
    block_length: int
    num_steps: int  # denoising steps per block of a fixed schedule
    cache: CacheName
    has_eos_stop: bool
    has_stop_inside: bool  # an EOS ends the row even if its block still holds masks after it
    forbidden_ids: tuple[int, ...]  # never produced
    unranked_ids: tuple[int, ...]  # left out of the distribution that positions are ranked by
    max_post_steps: int  # steps that may go over a complete block to edit it; 0 = tokens are final
    is_merged: bool  # one forward stores a complete block and takes the first step of the next
    has_first_step: bool  # the first step of a block commits its first position, whatever the policy

    @property
    def is_plain_draw(self) -> bool:
        """Whether candidates come from the network's own distribution, forbidden tokens aside, and are ranked by it."""
        decode = self.decode
        return decode.top_k is None and decode.top_p is None and not decode.compat and not self.unranked_ids

    @property
    def logp_temperature(self) -> float:
        """Temperature of the log-probs at commit; greedy decoding reports plain probabilities."""
        return self.decode.temperature or 1.0

    @property
    def min_total_steps(self) -> int:
        """Denoising steps of a completion that is not ended early; of a policy without a schedule at least so many."""
        num_blocks = -(-self.decode.gen_length // self.block_length)
        return num_blocks * (1 if self.decode.is_dynamic else self.num_steps)

    @property
    def is_packed(self) -> bool:
        """Whether packing the weights takes less time than it saves."""
        return self.min_total_steps >= _MIN_STEPS_TO_PACK

    @contextmanager
    def running(self, family: Family) -> Iterator[None]:
        """Around a rollout: no gradients, and on a CPU packed weights where they pay, and memory that is kept."""
        with torch.no_grad(), family.packed() if self.is_packed else nullcontext(), kept_heap():
            yield


def make_plan(family: Family, decode: Decode) -> Plan:
    """Options and defaults that fit the family. Raises DareError for combinations that do not work."""
    spec = family.spec
    block_length = spec.block_length if decode.block_length is None else decode.block_length
    try:
        decode.check_block(block_length)
    except ValueError as error:
        raise DareError(str(error), where="decode.steps_per_block") from None
    is_blockwise = spec.attention == "block_causal"
    cache = _pick_cache(family, decode, is_blockwise)
    if decode.cfg_scale and (is_blockwise or cache != "none"):
        raise DareError(
            "classifier-free guidance needs a masked model without a cache",
            where="decode.cfg_scale",
            got=f"cfg_scale {decode.cfg_scale}, family {spec.name}, cache {cache}",
            fix="set cfg_scale to 0" if is_blockwise else "set cache: none",
        )
    if decode.zero_eos_confidence and find_policy(decode.unmask).score != "confidence":
        raise DareError(
            "zero_eos_confidence needs a policy that ranks positions by the confidence of their candidates",
            where="decode.zero_eos_confidence",
            got=f"unmask: {decode.unmask}",
            expected="unmask: low_confidence, threshold or factor",
        )
    has_eos_stop = is_blockwise if decode.eos_stop is None else decode.eos_stop
    return Plan(
        decode=decode,
        block_length=block_length,
        num_steps=_num_steps(decode, block_length),
        cache=cache,
        has_eos_stop=has_eos_stop,
        has_stop_inside=has_eos_stop and "eos_inside_block" in decode.compat,
        forbidden_ids=(spec.mask_id, *(spec.eos_ids if decode.forbid_eos else ())),
        unranked_ids=spec.eos_ids if decode.forbid_eos or decode.zero_eos_confidence else (),
        max_post_steps=_max_post_steps(decode),
        is_merged=True,
        has_first_step=is_first_forced(cache, is_shifted=spec.is_shifted),
    )


def check_prompts(family: Family, prompts: list[list[int]]) -> None:
    """Raise DareError for a prompt that is masked itself; lengths and ids are checked where the canvas is laid out."""
    mask_id = family.spec.mask_id
    for index, prompt in enumerate(prompts):
        if mask_id in prompt:
            raise DareError(
                "a prompt holds the mask token, which marks positions to fill",
                where=f"row {index}, position {prompt.index(mask_id)}",
                got=f"token id {mask_id}",
                fix="remove it from the prompt",
            )


def _num_steps(decode: Decode, block_length: int) -> int:
    if decode.steps_per_block is not None:
        return decode.steps_per_block
    return max(1, block_length.bit_length() - 1) if decode.schedule == "ascending" else block_length


def _max_post_steps(decode: Decode) -> int:
    if decode.edit_threshold is None:
        return 0
    return _MAX_POST_STEPS if decode.max_post_steps is None else decode.max_post_steps


def _pick_cache(family: Family, decode: Decode, is_blockwise: bool) -> CacheName:
    if decode.cache == "none":
        return "none"
    if decode.cache == "auto":
        return "block" if is_blockwise else "none"
    if is_blockwise:
        raise DareError(
            f"cache: {decode.cache} approximates full attention",
            where="decode.cache",
            got=f"family {family.spec.name}",
            fix="use cache: auto, which is exact",
        )
    return decode.cache
