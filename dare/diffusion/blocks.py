"""Block ids (one truth for attention, corruption and rollout) and the attention masks made from them.

A mask is boolean, True = visible, broadcastable to [B, 1, T, K] for `scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.core.spec import BlockGrid

if TYPE_CHECKING:
    from torch import Tensor


def positions(is_real_BS: Tensor) -> Tensor:
    """int64 [B, S]: index of each position among the real ones of its row; 0 at leading padding."""
    return (is_real_BS.long().cumsum(-1) - 1).clamp(min=0)


def block_ids(is_real_BS: Tensor, prompt_length_B: Tensor, grid: BlockGrid, block_length: int) -> Tensor:
    """int64 [B, S]: block index of each position.

    "sequence" (SDAR, LLaDA2.x): blocks of `block_length` count from the first real position, so the first
    completion block may begin with the end of the prompt. "completion" (LLaDA, Dream; dLLM-RL's training of SDAR):
    blocks count from the first completion position, those of the prompt backwards from it: -1, -2, ...
    """
    position_BS = positions(is_real_BS)
    if grid == "sequence":
        return position_BS // block_length
    return (position_BS - prompt_length_B[:, None]).div(block_length, rounding_mode="floor")


def full_mask(is_real_BS: Tensor) -> Tensor | None:
    """Every query sees every real key; None when nothing has to be hidden."""
    if bool(is_real_BS.all()):
        return None
    return is_real_BS[:, None, None, :]


def block_causal_mask(block_BS: Tensor, is_real_BS: Tensor) -> Tensor:
    """[B, 1, S, S]: real query i sees real key j iff block(j) <= block(i). Padding sees itself."""
    visible = block_BS[:, :, None] >= block_BS[:, None, :]
    return _finish(visible, is_real_BS)


def two_stream_mask(block_BS: Tensor, is_real_BS: Tensor) -> Tensor:
    """[B, 1, 2S, 2S] for the input [noisy | clean] (BD3-LM, Arriola et al. 2025, section 3.2).

                 noisy keys      clean keys
    noisy query  same block      earlier blocks
    clean query  nothing         same or earlier blocks

    One forward then scores every block of `noisy` given the clean blocks before it. Padding sees itself.
    """
    query, key = block_BS[:, :, None], block_BS[:, None, :]
    noisy = torch.cat([query == key, query > key], dim=-1)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=-1)
    visible = torch.cat([noisy, clean], dim=-2)
    return _finish(visible, is_real_BS.repeat(1, 2))


def shared_context_masks(block_BS: Tensor, is_real_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The masks of `two_stream_mask` taken apart, for several noisy streams that share a clean one.

    [B, 1, S, S]   clean queries on clean keys: same or earlier blocks
    [B, 1, S, 2S]  noisy queries on [clean | own noisy] keys: earlier blocks | same block

    A noisy stream sees no other noisy stream. Padding sees itself.
    """
    query, key = block_BS[:, :, None], block_BS[:, None, :]
    is_pair_BSS = is_real_BS[:, :, None] & is_real_BS[:, None, :]
    own_BSS = torch.eye(block_BS.shape[1], dtype=torch.bool, device=block_BS.device) & ~is_real_BS[:, :, None]
    noisy = torch.cat([(query > key) & is_pair_BSS, ((query == key) & is_pair_BSS) | own_BSS], dim=-1)
    return block_causal_mask(block_BS, is_real_BS), noisy[:, None]


def _finish(visible_BTT: Tensor, is_real_BT: Tensor) -> Tensor:
    """Hide padding; let each padded query see itself, because a softmax over nothing is NaN."""
    visible = visible_BTT & is_real_BT[:, None, :] & is_real_BT[:, :, None]
    own = torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
    return (visible | (own & ~is_real_BT[:, :, None]))[:, None]
