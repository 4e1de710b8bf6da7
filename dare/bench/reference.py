"""Plain samplers to compare the engine with, written the way public ones are.

The head runs on every position of every call, probabilities and Gumbel noise are float64 over the vocabulary, a batch
is static: it takes as many steps as planned and ends together. Keys and values of a finished block take a forward of
their own, and joining old to new ones copies them in every layer. No code of `dare.rollout` is used, so equal tokens at
temperature 0 also say that the engine is right.

Where public code wastes more we do not follow it: Fast-dLLM rotates all stored keys at every call and draws its
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.families.base import Family
from dare.families.layers.attention import Cache, Visible, attend


class PlainRow(NamedTuple):
    """A completion, whole blocks; `steps` are the row's own denoising steps that committed its tokens."""

    tokens: list[int]
    steps: list[int]


def sample_plainly(
    family: Family, prompts: list[list[int]], decode: Decode, *, seed: int = 0, batch_size: int = 1
) -> list[PlainRow]:
    """The completion of each prompt. Policies: low_confidence, threshold. Without logit shift.

    batch_size  rows of a static batch; masked models with a cache and block models run one prompt at a time, as the
                public samplers do
    """
    if family.spec.is_shifted or decode.unmask not in ("low_confidence", "threshold"):
        raise ValueError(f"no plain sampler for shift {family.spec.is_shifted}, unmask {decode.unmask}")
    noise = torch.Generator(family.device).manual_seed(seed)
    with torch.no_grad():
        if family.spec.attention == "block_causal":
            return [_by_blocks(family, prompt, decode, noise) for prompt in prompts]
        if decode.cache in ("prefix", "dual"):
            return [_with_stale_cache(family, prompt, decode, noise) for prompt in prompts]
        batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        return [row for batch in batches for row in _whole_canvases(family, batch, decode, noise)]


@dataclass(frozen=True)
class _Work:
    """Rows that are filled in place.

    step_BS  the row's own step that committed a position; -1 before
    count_B  steps that each row took
    """

    ids_BS: Tensor
    step_BS: Tensor
    count_B: list[int]

    @classmethod
    def begin(cls, ids_BS: Tensor) -> _Work:
        return cls(ids_BS, torch.full_like(ids_BS, -1), [0] * len(ids_BS))

    def columns(self, first: int, last: int) -> _Work:
        """A view of these columns."""
        return _Work(self.ids_BS[:, first:last], self.step_BS[:, first:last], self.count_B)

    def row(self, index: int, first: int, last: int) -> PlainRow:
        return PlainRow(self.ids_BS[index, first:last].tolist(), self.step_BS[index, first:last].tolist())


def _whole_canvases(family: Family, prompts: list[list[int]], decode: Decode, noise: torch.Generator) -> list[PlainRow]:
    """A forward of all canvases at every step (LLaDA, `generate`)."""
    length = decode.block_length or family.spec.block_length
    canvas = family.empty_canvas(prompts, decode.gen_length, length)
    work, is_real_BS = _Work.begin(canvas.input_BS.to(family.device)), canvas.is_real_BS.to(family.device)
    for block in range(decode.gen_length // length):
        starts = [len(prompt) + block * length for prompt in prompts]
        is_block_BS = torch.zeros_like(is_real_BS)
        for row, start in enumerate(starts):
            is_block_BS[row, start : start + length] = True
        for step in range(length):
            if not bool(((work.ids_BS == family.spec.mask_id) & is_block_BS).any()):
                break
            logits_BSV = family.logits(work.ids_BS, is_real_BS)
            _commit(family, work, is_block_BS, logits_BSV, decode, noise, _quota(decode, length, length, step))
    return [work.row(row, len(prompt), len(prompt) + decode.gen_length) for row, prompt in enumerate(prompts)]


class _GrowingCache:
    """Keys and values [B, Hkv, S, hd] of each layer, joined to those of a call by copying both.

    is_storing  whether a call leaves what it joined
    """

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_storing = True

    def places(self, slot_BT: Tensor) -> Tensor:
        return slot_BT

    def attend(
        self, layer: int, query_BHTd: Tensor, key_BHTd: Tensor, value_BHTd: Tensor, place_N: Tensor, visible: Visible
    ) -> Tensor:
        joined = (key_BHTd, value_BHTd)
        if layer in self.stored:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.stored[layer], joined, strict=True))
            joined = (keys, values)
        if self.is_storing:
            self.stored[layer] = joined
        return attend(query_BHTd, *joined, visible)

    def cut(self, length: int) -> None:
        """Forget what lies beyond the first `length` slots."""
        self.stored = {
            layer: (keys[:, :, :length], values[:, :, :length]) for layer, (keys, values) in self.stored.items()
        }


def _with_stale_cache(family: Family, prompt: list[int], decode: Decode, noise: torch.Generator) -> PlainRow:
    """Prefix or dual cache (Fast-dLLM): the canvas at the first step of a block, then the rest of it or the block."""
    length = decode.block_length or family.spec.block_length
    ids_1S = torch.tensor([prompt + [family.spec.mask_id] * decode.gen_length], device=family.device)
    work, total = _Work.begin(ids_1S), ids_1S.shape[1]
    for start in range(len(prompt), total, length):
        cache = family.cache(1, total) if decode.cache == "dual" else _GrowingCache()
        for step in range(length):
            if not bool((ids_1S[:, start : start + length] == family.spec.mask_id).any()):
                break
            first, last = (0, total) if step == 0 else (start, start + length if decode.cache == "dual" else total)
            logits_1TV = _logits(family, ids_1S, first, last, None, cache)
            if isinstance(cache, _GrowingCache):
                cache.is_storing = False
                cache.cut(start)
            position_T = torch.arange(first, last, device=family.device)
            is_block_1T = ((position_T >= start) & (position_T < start + length))[None]
            quota = _quota(decode, length, length, step)
            _commit(family, work.columns(first, last), is_block_1T, logits_1TV, decode, noise, quota)
    return work.row(0, len(prompt), total)


def _by_blocks(family: Family, prompt: list[int], decode: Decode, noise: torch.Generator) -> PlainRow:
    """One block after the other over cached ones (SDAR), each finished block stored by a further forward."""
    spec, length = family.spec, decode.block_length or family.spec.block_length
    num_masks = decode.gen_length + -(len(prompt) + decode.gen_length) % length
    ids_1S = torch.tensor([prompt + [spec.mask_id] * num_masks], device=family.device)
    work, total, cache = _Work.begin(ids_1S), ids_1S.shape[1], _GrowingCache()

    def run(first: int, last: int, *, is_storing: bool) -> Tensor:
        cache.is_storing = is_storing
        block_S = torch.arange(last, device=family.device) // length
        return _logits(family, ids_1S, first, last, (block_S <= block_S[first:, None])[None, None], cache)

    start = len(prompt) // length * length
    if start:
        run(0, start, is_storing=True)
    for first in range(start, total, length):
        part_1T = ids_1S[:, first : first + length]
        num_masked = int((part_1T == spec.mask_id).sum())
        for step in range(length):
            if not bool((part_1T == spec.mask_id).any()):
                break
            logits_1TV = run(first, first + length, is_storing=False)
            every, quota = torch.ones_like(part_1T, dtype=torch.bool), _quota(decode, num_masked, length, step)
            _commit(family, work.columns(first, first + length), every, logits_1TV, decode, noise, quota)
        run(first, first + length, is_storing=True)
        if decode.eos_stop is not False and any(token in spec.eos_ids for token in ids_1S[0, len(prompt) :].tolist()):
            return work.row(0, len(prompt), first + length)
    return work.row(0, len(prompt), total)


def _logits(family: Family, ids_1S: Tensor, first: int, last: int, visible: Visible, cache: Cache) -> Tensor:
    """[1, T, V] of the positions from `first` to before `last`."""
    position_1T = torch.arange(first, last, device=family.device)[None]
    return family.row_logits(family.hidden(ids_1S[:, first:last], position_1T, visible, cache)[0])[None]


def _quota(decode: Decode, num_masked: int, length: int, step: int) -> int | None:
    """Tokens due at a step of the fixed schedule; None where the threshold decides."""
    if decode.is_dynamic:
        return None
    num_steps = decode.steps_per_block or length
    return num_masked // num_steps + (step < num_masked % num_steps)


def _commit(
    family: Family,
    work: _Work,
    is_block_BT: Tensor,
    logits_BTV: Tensor,
    decode: Decode,
    noise: torch.Generator,
    quota: int | None,
) -> None:
    """Fill in the most confident candidates, row by row."""
    mask_id = family.spec.mask_id
    probs_BTV = logits_BTV.double().softmax(-1)
    logits_BTV[..., mask_id] = -torch.inf
    noisy_BTV = logits_BTV
    if decode.temperature:
        noisy_BTV = logits_BTV.double()
        uniform_BTV = torch.rand(noisy_BTV.shape, generator=noise, dtype=torch.float64, device=noisy_BTV.device)
        noisy_BTV = noisy_BTV - decode.temperature * torch.log(-torch.log(uniform_BTV))
    token_BT = noisy_BTV.argmax(-1)
    sure_BT = probs_BTV.gather(-1, token_BT[..., None])[..., 0]
    sure_BT = sure_BT.masked_fill(~is_block_BT | (work.ids_BS != mask_id), -torch.inf)
    for row in range(len(work.ids_BS)):
        num_masked = int(sure_BT[row].isfinite().sum())
        above = int((sure_BT[row] > (0.9 if decode.threshold is None else decode.threshold)).sum())
        chosen = sure_BT[row].topk(min(num_masked, max(1, above) if quota is None else quota)).indices
        work.ids_BS[row, chosen] = token_BT[row, chosen]
        work.step_BS[row, chosen] = work.count_B[row]
        work.count_B[row] += num_masked > 0
