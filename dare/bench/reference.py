"""Plain samplers to compare the engine with, written the way public ones are.

The head runs on every position of every call, probabilities and Gumbel noise are float64 over the vocabulary, a batch
is static: it takes as many steps as planned and ends together. Keys and values of a finished block take a forward of
their own. No code of `dare.rollout` is used, so equal tokens at temperature 0 also say that the engine is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.families.base import Family


def sample_plainly(
    family: Family, prompts: list[list[int]], decode: Decode, *, seed: int = 0, batch_size: int = 1
) -> list[list[int]]:
    """The completion of each prompt, whole blocks. Policies: low_confidence, threshold. Without logit shift.

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


def _whole_canvases(
    family: Family, prompts: list[list[int]], decode: Decode, noise: torch.Generator
) -> list[list[int]]:
    """A forward of all canvases at every step (LLaDA, `generate`)."""
    length = decode.block_length or family.spec.block_length
    canvas = family.empty_canvas(prompts, decode.gen_length, length)
    ids_BS, is_real_BS = canvas.input_BS.to(family.device), canvas.is_real_BS.to(family.device)
    for block in range(decode.gen_length // length):
        starts = [len(prompt) + block * length for prompt in prompts]
        is_block_BS = torch.zeros_like(is_real_BS)
        for row, start in enumerate(starts):
            is_block_BS[row, start : start + length] = True
        for step in range(length):
            if not bool(((ids_BS == family.spec.mask_id) & is_block_BS).any()):
                break
            logits_BSV = family.logits(ids_BS, is_real_BS)
            _commit(family, ids_BS, is_block_BS, logits_BSV, decode, noise, _quota(decode, length, length, step))
    return [ids_BS[row, len(prompt) : len(prompt) + decode.gen_length].tolist() for row, prompt in enumerate(prompts)]


def _with_stale_cache(family: Family, prompt: list[int], decode: Decode, noise: torch.Generator) -> list[int]:
    """Prefix or dual cache (Fast-dLLM): the canvas at the first step of a block, then the rest of it or the block."""
    length = decode.block_length or family.spec.block_length
    ids_1S = torch.tensor([prompt + [family.spec.mask_id] * decode.gen_length], device=family.device)
    total = ids_1S.shape[1]
    cache = family.cache(1, total)
    for start in range(len(prompt), total, length):
        for step in range(length):
            if not bool((ids_1S[:, start : start + length] == family.spec.mask_id).any()):
                break
            first, last = (0, total) if step == 0 else (start, start + length if decode.cache == "dual" else total)
            position_1T = torch.arange(first, last, device=family.device)[None]
            hidden_1TD = family.hidden(ids_1S[:, first:last], position_1T, None, cache)
            logits_1TV = family.row_logits(hidden_1TD[0])[None]
            part_1T = ids_1S[:, first:last]
            is_block_1T = (position_1T >= start) & (position_1T < start + length)
            _commit(family, part_1T, is_block_1T, logits_1TV, decode, noise, _quota(decode, length, length, step))
    return ids_1S[0, len(prompt) :].tolist()


def _by_blocks(family: Family, prompt: list[int], decode: Decode, noise: torch.Generator) -> list[int]:
    """One block after the other over cached ones (SDAR), each finished block stored by a further forward."""
    spec, length = family.spec, decode.block_length or family.spec.block_length
    num_masks = decode.gen_length + -(len(prompt) + decode.gen_length) % length
    ids_1S = torch.tensor([prompt + [spec.mask_id] * num_masks], device=family.device)
    total = ids_1S.shape[1]
    cache, slot_S = family.cache(1, total), torch.arange(total, device=family.device)

    def run(first: int, last: int) -> Tensor:
        position_1T = slot_S[None, first:last]
        visible = (slot_S // length <= position_1T[0, :, None] // length)[None, None]
        return family.hidden(ids_1S[:, first:last], position_1T, visible, cache)

    start = len(prompt) // length * length
    if start:
        run(0, start)
    for first in range(start, total, length):
        part_1T = ids_1S[:, first : first + length]
        num_masked = int((part_1T == spec.mask_id).sum())
        for step in range(length):
            if not bool((part_1T == spec.mask_id).any()):
                break
            logits_1TV = family.row_logits(run(first, first + length)[0])[None]
            every = torch.ones_like(part_1T, dtype=torch.bool)
            _commit(family, part_1T, every, logits_1TV, decode, noise, _quota(decode, num_masked, length, step))
        run(first, first + length)
        if decode.eos_stop is not False and any(token in spec.eos_ids for token in ids_1S[0, len(prompt) :].tolist()):
            return ids_1S[0, len(prompt) : first + length].tolist()
    return ids_1S[0, len(prompt) :].tolist()


def _quota(decode: Decode, num_masked: int, length: int, step: int) -> int | None:
    """Tokens due at a step of the fixed schedule; None where the threshold decides."""
    if decode.is_dynamic:
        return None
    num_steps = decode.steps_per_block or length
    return num_masked // num_steps + (step < num_masked % num_steps)


def _commit(
    family: Family,
    ids_BT: Tensor,
    is_block_BT: Tensor,
    logits_BTV: Tensor,
    decode: Decode,
    noise: torch.Generator,
    quota: int | None,
) -> None:
    """Fill in the most confident candidates, row by row."""
    mask_id = family.spec.mask_id
    allowed_BTV = logits_BTV.clone()
    allowed_BTV[..., mask_id] = -torch.inf
    noisy_BTV = allowed_BTV
    if decode.temperature:
        noisy_BTV = allowed_BTV.double()
        uniform_BTV = torch.rand(noisy_BTV.shape, generator=noise, dtype=torch.float64, device=noisy_BTV.device)
        noisy_BTV = noisy_BTV - decode.temperature * torch.log(-torch.log(uniform_BTV))
    token_BT = noisy_BTV.argmax(-1)
    probs_BTV = logits_BTV.double().softmax(-1)
    sure_BT = probs_BTV.gather(-1, token_BT[..., None])[..., 0]
    sure_BT = sure_BT.masked_fill(~is_block_BT | (ids_BT != mask_id), -torch.inf)
    for row in range(len(ids_BT)):
        num_masked = int(sure_BT[row].isfinite().sum())
        above = int((sure_BT[row] > (0.9 if decode.threshold is None else decode.threshold)).sum())
        chosen = sure_BT[row].topk(min(num_masked, max(1, above) if quota is None else quota)).indices
        ids_BT[row, chosen] = token_BT[row, chosen]
