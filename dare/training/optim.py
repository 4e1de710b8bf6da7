"""AdamW with fp32 masters, fp32 gradient accumulation, global-norm clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dare.core.errors import DareError, NonFiniteError
from dare.core.recipe import OptimizerRecipe
from dare.families.layers.quantized import require_bitsandbytes

_BLOCKWISE = ("qmap1", "qmap2", "absmax1", "absmax2")  # of 8-bit moments; not one number per weight


def learning_rate(recipe: OptimizerRecipe, step: int, num_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to min_lr_ratio * lr."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    progress = min(1.0, (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps))
    shape = 1.0 - progress if recipe.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.lr * (recipe.min_lr_ratio + (1.0 - recipe.min_lr_ratio) * shape)


class Optimizer:
    """Owns the masters: for a float32 parameter the parameter itself, otherwise a float32 copy.

    Gradients of low-precision parameters are moved into their master's float32 gradient as soon as the
    backward has produced them, so that micro-batches are summed in float32.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], recipe: OptimizerRecipe, num_steps: int) -> None:
        self.recipe = recipe
        self.num_steps = num_steps
        self.num_done = 0
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.masters = {name: _master(parameter) for name, parameter in self.parameters.items()}
        groups = [
            {"params": params, "weight_decay": recipe.weight_decay if is_matrix else 0.0}
            for is_matrix in (True, False)
            for params in _by_kind([master for master in self.masters.values() if (master.ndim >= 2) is is_matrix])
        ]
        self.adam = _adamw(groups, recipe)

    def step(self) -> dict[str, float]:
        """Clip, update, copy masters back, clear gradients.

        Raises NonFiniteError naming the first bad parameter before any weight has changed.
        """
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = total_norm(grads)
        if not math.isfinite(norm):
            raise NonFiniteError(
                "the gradient is not finite",
                where=f"optimizer step {self.num_done}, parameter {self._first_bad()}",
                got=norm,
                fix="lower optimizer.lr, or look at the samples of the last steps; the last checkpoint is intact",
            )
        if norm > self.recipe.max_grad_norm:
            for kind in _by_kind(grads):
                torch._foreach_mul_(kind, self.recipe.max_grad_norm / norm)
        rate = learning_rate(self.recipe, self.num_done, self.num_steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
        self.num_done += 1
        return {"grad_norm": norm, "lr": rate}

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as flat tensors: step count, moments, and masters that are copies."""
        tensors = {"num_done": torch.tensor(self.num_done)}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().clone()
            if master is not self.parameters[name]:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises DareError if it belongs to another set of parameters."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if not name:
                continue
            is_moment = tensor.ndim and kind not in _BLOCKWISE
            if name not in self.masters or (is_moment and tensor.shape != self.masters[name].shape):
                raise DareError("the optimizer state belongs to another model", got=f"{key} {tuple(tensor.shape)}")
            moments.setdefault(name, {})[kind] = tensor.clone()
        for name, master in self.masters.items():
            state = moments.get(name, {})
            if master is not self.parameters[name]:
                if "master" not in state:
                    raise DareError("the optimizer state belongs to a model of another dtype", got=f"no master/{name}")
                with torch.no_grad():
                    master.copy_(state.pop("master"))
            if state:  # none for a parameter that has not had a gradient yet
                self.adam.state[master] = _adam_state(state, self.recipe)
        self.num_done = int(tensors["num_done"])

    def _first_bad(self) -> str:
        for name, master in self.masters.items():
            if master.grad is not None and not math.isfinite(total_norm([master.grad])):
                return name
        return "unknown (the norm itself overflowed)"


def total_norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all tensors together; of whole tensors, where processes hold shards of them."""
    squares = 0.0
    for kind in _by_kind(tensors):
        norm = torch.nn.utils.get_total_norm(kind)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return math.sqrt(squares)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sharded tensors and whole ones apart, since no operation takes both; no empty lists."""
    sharded: list[Tensor] = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    return [kind for kind in (sharded, whole) if kind]


def _adamw(groups: list[dict[str, Any]], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """torch's, or with 8-bit moments (Dettmers et al. 2022) that of bitsandbytes, which keeps small ones in float32."""
    if recipe.moments == "float32":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    device = groups[0]["params"][0].device
    optim = require_bitsandbytes(device, where="optimizer.moments").optim
    adam: torch.optim.Optimizer = optim.AdamW8bit(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    return adam


def _adam_state(state: dict[str, Tensor], recipe: OptimizerRecipe) -> dict[str, Any]:
    """Stored moments as the optimizer has them. Raises DareError if they are those of the other kind."""
    is_compact = recipe.moments == "8bit"
    expected = "state1" if is_compact else "exp_avg"
    if expected not in state:
        raise DareError("the optimizer state has other moments", got=sorted(state), expected=expected)
    return {**state, "step": int(state["step"])} if is_compact else {**state}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def move_gradient(low: Tensor) -> None:
        if low.grad is not None:
            grad = low.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            low.grad = None

    parameter.register_post_accumulate_grad_hook(move_gradient)  # type: ignore[no-untyped-call]
    return master
