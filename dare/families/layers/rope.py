"""Rotary position embedding (Su et al. 2021), rotate-half layout: dimension i pairs with i + rotary_dim / 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 [B, T, 1, rotary_dim]; made once per forward, shared by all layers.

    Both halves of the pairs, with the sign that each half takes: sin is that of minus the angle in the first.
    """

    cos: Tensor
    sin: Tensor


def rotation(position_BT: Tensor, rotary_dim: int, theta: float) -> Rotation:
    """Angles `position * theta ** (-2 i / rotary_dim)`, in float32.

    rotary_dim  how many of a head's dimensions turn: all of them, or the first half of each head in LLaDA2.x

    Computed from the positions of the call instead of kept as a buffer: a network has no state beyond its
    checkpoint, and no table to outgrow.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=position_BT.device).float() / rotary_dim
    angle = position_BT[:, :, None, None].float() * (1.0 / theta**exponent)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x_BTHd: Tensor, by: Rotation) -> Tensor:
    """Each pair of the first `rotary_dim` dimensions turned by its angle; float32 inside, the dtype of `x` outside.

    LLaDA's code does the same; SDAR's rotates in the model's dtype, which is equal in float32.
    """
    size = by.cos.shape[-1]
    plain = x_BTHd[..., :size].float()
    turned = (plain * by.cos + plain.roll(size // 2, -1) * by.sin).to(x_BTHd.dtype)
    return turned if size == x_BTHd.shape[-1] else torch.cat([turned, x_BTHd[..., size:]], dim=-1)
