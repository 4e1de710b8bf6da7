"""A critic: the backbone of a family with one number per position instead of a distribution over tokens.

It reads the same views as the policy and gives the value of a position that is about to be committed (the diffusion
value model of TraceRL, Wang et al. 2025).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dare.core.types import Canvas, Views
from dare.families.base import Family


class Critic:
    """Starts as a copy of the policy's backbone under a head of zeros, so that every first value is 0."""

    def __init__(self, family: Family) -> None:
        self.family = copy.deepcopy(family)
        network = self.family.network
        self.head = nn.Parameter(torch.zeros(network.head_weight.shape[1], dtype=torch.float32, device=family.device))

    def view_value(self, views: Views, canvas: Canvas) -> Tensor:
        """float32 [R, S], differentiable: the value at each target; 0 elsewhere. `canvas` as in `Family.view_logp`."""
        hidden_RTD = self.family.view_hidden(views, canvas, is_read_RS=views.is_target_RS)
        length = hidden_RTD.shape[1]
        is_target_RT = views.is_target_RS[:, :length].to(self.family.device)
        value_RT = torch.where(is_target_RT, hidden_RTD.float() @ self.head, 0.0)
        return nn.functional.pad(value_RT, (0, views.noisy_RS.shape[1] - length))

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that a critic's value depends on and that is trained or saved; a language-model head that no
        value reads simply never gets a gradient."""
        return [*self.family.network.named_parameters(), ("value_head", self.head)]

    def state(self) -> dict[str, Tensor]:
        """The weights as flat tensors."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises KeyError if a weight is missing."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])
