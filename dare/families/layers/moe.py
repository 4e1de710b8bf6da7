"""Mixture of experts: routers that choose experts for each token, and experts that run only the tokens they are given.

Shapes: N tokens, E experts, A experts per token, D width, F expert width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_ALIGNMENT = 16  # bytes; rows of a grouped matmul start at multiples of it
_GROUPED_MM: Callable[..., Tensor] | None = getattr(functional, "grouped_mm", getattr(torch, "_grouped_mm", None))


class Route(NamedTuple):
    """logits_NE float32: a router's raw scores. expert_NA int64: the chosen. weight_NA float32: what they count."""

    logits_NE: Tensor
    expert_NA: Tensor
    weight_NA: Tensor


class Router(nn.Module, ABC):
    """Chooses `experts_per_token` experts for each token from a linear score."""

    def __init__(self, num_experts: int, hidden_size: int, experts_per_token: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.experts_per_token = experts_per_token

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Route: ...


class SoftmaxRouter(Router):
    """The most probable experts, weighted by their probability (Qwen3-MoE, OLMoE).

    The score is a matmul in the model's dtype, as in the official code; the softmax is float32. `is_normalised`:
    the weights of the chosen add up to 1. An expert bias is added to the probabilities themselves (LLaDA-MoE): it
    changes the choice and the weights.
    """

    def __init__(self, num_experts: int, hidden_size: int, experts_per_token: int, *, is_normalised: bool) -> None:
        super().__init__(num_experts, hidden_size, experts_per_token)
        self.is_normalised = is_normalised

    def forward(self, x_ND: Tensor, expert_bias_E: Tensor | None = None) -> Route:
        logits_NE = functional.linear(x_ND, self.weight).float()
        probability_NE = logits_NE.softmax(-1)
        if expert_bias_E is not None:
            probability_NE = probability_NE + expert_bias_E
        weight_NA, expert_NA = probability_NE.topk(self.experts_per_token, dim=-1)
        if self.is_normalised:
            weight_NA = weight_NA / weight_NA.sum(-1, keepdim=True)
        return Route(logits_NE, expert_NA, weight_NA)


class GroupedSigmoidRouter(Router):
    """Group-limited choice with a correction bias (DeepSeek-V3, 2024, section 2.1.2; LLaDA2.x), all in float32.

    The bias only steers the choice: a group scores the sum of its two best `sigmoid + bias`, the best groups stay,
    and the best experts within them are chosen. Weights are the sigmoids alone, normalised and scaled.
    """

    expert_bias: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        experts_per_token: int,
        *,
        num_groups: int,
        groups_per_token: int,
        scale: float,
    ) -> None:
        super().__init__(num_experts, hidden_size, experts_per_token)
        self.num_groups = num_groups
        self.groups_per_token = groups_per_token
        self.scale = scale
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> Route:
        logits_NE = functional.linear(x_ND.float(), self.weight.float())
        score_NE = logits_NE.sigmoid()
        group_size = score_NE.shape[-1] // self.num_groups
        choice_NGe = (score_NE + self.expert_bias).view(len(x_ND), self.num_groups, group_size)
        group_NG = choice_NGe.topk(2, dim=-1).values.sum(-1)
        kept = group_NG.topk(self.groups_per_token, dim=-1).indices
        is_kept_NG = torch.zeros_like(group_NG, dtype=torch.bool).scatter_(-1, kept, True)
        choice_NE = choice_NGe.masked_fill(~is_kept_NG[..., None], float("-inf")).flatten(-2)
        expert_NA = choice_NE.topk(self.experts_per_token, dim=-1).indices
        weight_NA = score_NE.gather(-1, expert_NA)
        if self.experts_per_token > 1:
            weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
        return Route(logits_NE, expert_NA, weight_NA * self.scale)


class Experts(nn.Module):
    """E gated feed-forward layers with stacked weights, which one grouped matmul can run.

    In a state dict they have their official names, one matrix per expert: `0.gate_proj.weight` and so on.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))

    def forward(self, x_ND: Tensor, route: Route) -> Tensor:
        """[N, D]: the weighted sum of each token's experts, summed in float32.

        The work is one feed-forward pass per (token, chosen expert), sorted by expert. Official MoE code of SDAR
        and LLaDA-MoE sums in the model's dtype, which is equal in float32.
        """
        return by_expert(self.run_sorted, x_ND, route)

    def run_sorted(self, sorted_x: Tensor, end_E: Tensor) -> Tensor:
        """Rows `end[e - 1]:end[e]` through expert e, unweighted."""
        run = grouped_swiglu if can_group(sorted_x, self.gate_proj) else looped_swiglu
        return run(sorted_x, end_E, self.gate_proj, self.up_proj, self.down_proj)

    def _official(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, stacked in self._parameters.items():
            if stacked is not None:
                for index, matrix in enumerate(stacked.unbind(0)):
                    yield f"{prefix}{index}.{name}.weight", matrix

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, matrix in self._official(prefix):
            destination[name] = matrix if keep_vars else matrix.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = dict(self._official(prefix))
        for name, matrix in own.items():
            if name not in state_dict:
                missing_keys.append(name)
            elif state_dict[name].shape != matrix.shape:
                error_msgs.append(f"{name}: got {list(state_dict[name].shape)}, expected {list(matrix.shape)}")
            else:
                matrix.detach().copy_(state_dict[name])
        unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in own]


def by_expert(run_sorted: Callable[[Tensor, Tensor], Tensor], x_ND: Tensor, route: Route) -> Tensor:
    """[N, D]: each token's chosen experts, summed with its weights in float32.

    run_sorted  (rows sorted by expert, end_E) -> rows; rows `end[e - 1]:end[e]` belong to expert e
    """
    num_tokens, per_token = route.expert_NA.shape
    if not num_tokens:
        return x_ND
    chosen = route.expert_NA.flatten()
    order = chosen.argsort(stable=True)
    ids_E = torch.arange(route.logits_NE.shape[-1], device=chosen.device)
    end_E = torch.searchsorted(chosen[order], ids_E, right=True)
    sorted_y = run_sorted(x_ND[order // per_token], end_E)
    y_NAD = sorted_y[order.argsort()].view(num_tokens, per_token, -1)
    return (y_NAD.float() * route.weight_NA[..., None]).sum(1).to(x_ND.dtype)


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether the GPU has a grouped matmul for these tensors: bfloat16, aligned rows, Hopper or later."""
    return (
        _GROUPED_MM is not None
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and all(size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def grouped_swiglu(sorted_x: Tensor, end_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Rows `end[e - 1]:end[e]` through expert e: three grouped matmuls, and no wait for the device."""
    if _GROUPED_MM is None:
        raise RuntimeError("this torch has no grouped matmul")
    ends = end_E.int()
    hidden = functional.silu(_GROUPED_MM(sorted_x, gate.mT, offs=ends)) * _GROUPED_MM(sorted_x, up.mT, offs=ends)
    return _GROUPED_MM(hidden, down.mT, offs=ends)


def looped_swiglu(sorted_x: Tensor, end_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same, expert by expert."""
    # Unbound once: indexing would give each expert a gradient of the whole stack.
    gate_EFD, up_EFD, down_EDF = gate.unbind(0), up.unbind(0), down.unbind(0)

    def run(expert: int, x: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, gate_EFD[expert])) * functional.linear(x, up_EFD[expert])
        return functional.linear(hidden, down_EDF[expert])

    return looped(run, sorted_x, end_E)


def looped(run: Callable[[int, Tensor], Tensor], sorted_x: Tensor, end_E: Tensor) -> Tensor:
    """`run(expert, its rows)` for every expert, joined; experts without tokens cost nothing."""
    parts, start = [], 0
    for expert, end in enumerate(end_E.tolist()):
        if end > start:
            parts.append(run(expert, sorted_x[start:end]))
        start = end
    return torch.cat(parts)


def sorted_linear(sorted_x: Tensor, end_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """Rows `end[e - 1]:end[e]` times the matrix of expert e, grouped where the device can."""
    if _GROUPED_MM is not None and can_group(sorted_x, weight_EOI):
        return _GROUPED_MM(sorted_x, weight_EOI.mT, offs=end_E.int())
    weights = weight_EOI.unbind(0)
    return looped(lambda expert, x: functional.linear(x, weights[expert]), sorted_x, end_E)


@contextmanager
def recorded_routes(network: nn.Module) -> Iterator[list[Route]]:
    """The detached routes of every router call inside the block, in layer order; dense networks have none."""
    routes: list[Route] = []

    def record(_router: nn.Module, _inputs: Any, route: Route) -> None:
        routes.append(Route(*(tensor.detach() for tensor in route)))

    handles = [module.register_forward_hook(record) for module in network.modules() if isinstance(module, Router)]
    try:
        yield routes
    finally:
        for handle in handles:
            handle.remove()


class ExpertLoad:
    """How evenly real tokens spread over experts, added up over calls; padding does not count."""

    def __init__(self) -> None:
        self._count_LE: Tensor | None = None

    @contextmanager
    def counting(self, network: nn.Module, is_real_BT: Tensor, is_read_BT: Tensor) -> Iterator[None]:
        """Count the experts that the forward of [B, T] tokens inside the block chooses.

        A last layer that runs only the tokens that are read, in their order, counts those of them that are real.
        """
        with recorded_routes(network) as routes:
            yield
        if not routes:
            return
        is_real_N, is_real_M = is_real_BT.flatten(), is_real_BT[is_read_BT]
        count_LE = torch.zeros(len(routes), routes[0].logits_NE.shape[-1], dtype=torch.int64, device=is_real_BT.device)
        for count_E, route in zip(count_LE, routes, strict=True):
            is_counted = is_real_N if len(route.expert_NA) == len(is_real_N) else is_real_M
            count_E.scatter_add_(
                0, route.expert_NA.flatten(), is_counted[:, None].expand_as(route.expert_NA).flatten().long()
            )
        self._count_LE = count_LE if self._count_LE is None else self._count_LE + count_LE

    @classmethod
    def joined(cls, parts: Sequence[ExpertLoad]) -> ExpertLoad:
        """The load of several processes together; some may have counted nothing."""
        counts = [part._count_LE.cpu() for part in parts if part._count_LE is not None]
        whole = cls()
        whole._count_LE = torch.stack(counts).sum(0) if counts else None
        return whole

    def metrics(self) -> dict[str, float]:
        """Empty without experts or tokens; otherwise, over all layers:

        expert_imbalance  the busiest expert's tokens relative to an even spread, in the worst layer; 1 = even
        unused_experts    share of experts that no token chose
        """
        if self._count_LE is None or not bool(self._count_LE.any()):
            return {}
        count_LE = self._count_LE.double()
        return {
            "expert_imbalance": float((count_LE.amax(-1) / count_LE.mean(-1)).max()),
            "unused_experts": float((count_LE == 0).double().mean()),
        }
