"""Rotary position embedding (Su et al. 2021), rotate-half layout: dimension i pairs with i + head_dim / 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of every angle, float32 [B, 1, T, hd / 2]; made once per forward and shared by all layers."""

    cos: Tensor
    sin: Tensor


def rotation(position_BT: Tensor, head_dim: int, theta: float) -> Rotation:
    """Angles `position * theta ** (-2 i / head_dim)`, in float32.

    Computed from the positions of the call instead of kept as a buffer: a network has no state beyond its
    checkpoint, and no table to outgrow.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_BT.device).float() / head_dim
    angle = position_BT[:, None, :, None].float() * (1.0 / theta**exponent)
    return Rotation(angle.cos(), angle.sin())


def rotate(x_BHTd: Tensor, by: Rotation) -> Tensor:
    """Each pair of dimensions turned by its angle; float32 inside, the dtype of `x` outside.

    LLaDA's code does the same; SDAR's rotates in the model's dtype, which is equal in float32.
    """
    first, second = x_BHTd.float().chunk(2, dim=-1)
    turned = torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin], dim=-1)
    return turned.to(x_BHTd.dtype)
