"""Losses of preferences on margins: how much more likely than the reference a policy makes a completion, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Link = Literal["logistic", "squared", "hinge"]


def pair_loss(link: Link, score_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[P]: the loss of each pair from its score, the chosen side's margin minus the rejected one's.

    "logistic" -(1 - e) log sigma(beta s) - e log sigma(-beta s), e the label smoothing (DPO, Rafailov et al. 2023)
    "squared"  (s - 1 / (2 beta))^2 (Azar et al. 2023)
    "hinge"    max(0, 1 - beta s) (SLiC, Zhao et al. 2023)
    """
    if link == "squared":
        return (score_P - 1 / (2 * beta)).square()
    if link == "hinge":
        return (1 - beta * score_P).clamp(min=0.0)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * log_sigmoid(beta * score_P) - label_smoothing * log_sigmoid(-beta * score_P)


def kto_loss(
    margin_B: Tensor, is_good_B: Tensor, baseline: Tensor, beta: float, weight_good: float, weight_bad: float
) -> Tensor:
    """[B]: w (1 - sigma(+-beta (margin - baseline))), plus for good completions (KTO, Ethayarajh et al. 2024)."""
    logit_B = beta * (margin_B - baseline)
    value_B = torch.sigmoid(torch.where(is_good_B, logit_B, -logit_B))
    weight_B = torch.full_like(value_B, weight_bad).masked_fill(is_good_B, weight_good)
    return weight_B * (1 - value_B)
