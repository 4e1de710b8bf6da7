"""Log-probs of chosen tokens without ever holding [positions, vocabulary] logits.

Shapes: N positions, C positions of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in float32


def chunk_rows(vocab_size: int) -> int:
    """Rows per chunk such that one chunk of logits stays small."""
    return max(1, _CHUNK_ELEMENTS // vocab_size)


def linear_logp(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale: float = 1.0) -> Tensor:
    """float32 [N]: natural log-prob of `target_N` under softmax(hidden @ weight.T * scale).

    Memory beyond inputs and gradients: one float32 chunk of logits (and one in the inputs' dtype, if that is another),
    forward and backward, whatever N is. The backward computes the logits again.
    """
    result: Tensor = _LinearLogp.apply(hidden_ND, weight_VD, target_N, scale)  # type: ignore[no-untyped-call]
    return result


def linear_total(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, factor_N: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`(factor_N * logp_N).sum()`, differentiable, and the float32 logp_N of `linear_logp`, without a graph.

    Where the factors are known beforehand, the gradient is computed along with the log-probs, while a chunk of logits
    is there: three matrix products instead of four. Memory as in `linear_logp`.
    """
    total, logp_N = _LinearTotal.apply(hidden_ND, weight_VD, target_N, factor_N, scale)  # type: ignore[no-untyped-call]
    return total, logp_N


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, target_N)
        ctx.scale = scale
        parts = _parts(hidden_ND, weight_VD)
        return torch.cat([_chunk(hidden_ND[part], weight_VD, target_N[part], scale)[0] for part in parts])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (factor_N,) = grads
        hidden_ND, weight_VD, target_N = ctx.saved_tensors
        _, grad_hidden, grad_weight = _logp_and_grads(
            hidden_ND, weight_VD, target_N, factor_N, ctx.scale, needs_weight=ctx.needs_input_grad[1]
        )
        return grad_hidden, grad_weight, None, None


class _LinearTotal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, factor_N: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        logp_N, ctx.grad_hidden, ctx.grad_weight = _logp_and_grads(
            hidden_ND, weight_VD, target_N, factor_N, scale, needs_weight=ctx.needs_input_grad[1]
        )
        ctx.mark_non_differentiable(logp_N)
        return (factor_N * logp_N).sum(), logp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_total, _ = grads
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None  # scaled in place and given away: a second backward would be wrong
        if grad_hidden is None:
            raise RuntimeError("the gradient of linear_total can be taken once")
        scaled = None if grad_weight is None else grad_weight.mul_(grad_total)
        return grad_hidden.mul_(grad_total), scaled, None, None, None


def _logp_and_grads(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, factor_N: Tensor, scale: float, *, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logp_N, and the gradients of `(factor_N * logp_N).sum()`; that of the weight is summed in float32."""
    logp_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    grad_hidden = torch.empty_like(hidden_ND)
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
    is_exact = weight_VD.dtype == torch.float32
    for part in _parts(hidden_ND, weight_VD):
        hidden_CD, target_C = hidden_ND[part], target_N[part]
        logp_N[part], grad_CV = _chunk(hidden_CD, weight_VD, target_C, scale)
        # d (factor * logp) / d logits = factor * scale * (1 at the target - probability)
        factor_C1 = factor_N[part, None] * scale
        grad_CV.mul_(-factor_C1).scatter_add_(-1, target_C[:, None], factor_C1)
        grad_CV = grad_CV.to(hidden_CD.dtype)
        grad_hidden[part] = grad_CV @ weight_VD
        if grad_weight is not None and is_exact:
            grad_weight.addmm_(grad_CV.T, hidden_CD)
        elif grad_weight is not None:
            grad_weight += grad_CV.T @ hidden_CD
        del grad_CV  # or it would still be there while the next chunk is made
    return logp_N, grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype)


def _chunk(hidden_CD: Tensor, weight_VD: Tensor, target_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """float32 logp [C] and probabilities [C, V], which take the place of the logits."""
    logits_CV = (hidden_CD @ weight_VD.T).float()
    if scale != 1.0:
        logits_CV.mul_(scale)
    top_C1 = logits_CV.amax(-1, keepdim=True)
    above_C1 = logits_CV.gather(-1, target_C[:, None]) - top_C1
    probs_CV = logits_CV.sub_(top_C1).exp_()
    total_C1 = probs_CV.sum(-1, keepdim=True)
    return (above_C1 - total_C1.log())[:, 0], probs_CV.div_(total_C1)


def _parts(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """The chunks of N positions; one that may be empty if there is none."""
    rows, num = chunk_rows(len(weight_VD)), len(hidden_ND)
    return [slice(start, min(start + rows, num)) for start in range(0, max(num, 1), rows)]
