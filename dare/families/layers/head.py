"""Log-probs of chosen tokens without ever holding [positions, vocabulary] logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in float32


def chunk_rows(vocab_size: int) -> int:
    """Rows per chunk such that one chunk of logits stays small."""
    return max(1, _CHUNK_ELEMENTS // vocab_size)


class _LinearLogp(torch.autograd.Function):
    """log softmax(hidden @ weight.T * scale)[target], chunked; the backward recomputes each chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale: float) -> Tensor:
        logp_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(logp_N)
        rows = chunk_rows(weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden_ND[part] @ weight_VD.T).float() * scale
            lse_N[part] = logits.logsumexp(-1)
            logp_N[part] = logits.gather(-1, target_N[part, None])[:, 0] - lse_N[part]
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N)
        ctx.scale = scale
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_N,) = grads
        hidden_ND, weight_VD, target_N, lse_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        rows = chunk_rows(weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden_ND[part] @ weight_VD.T).float() * ctx.scale
            scaled_N1 = grad_N[part, None] * ctx.scale
            grad_logits = (logits - lse_N[part, None]).exp_().mul_(-scaled_N1)
            grad_logits.scatter_add_(-1, target_N[part, None], scaled_N1)
            grad_logits = grad_logits.to(hidden_ND.dtype)
            grad_hidden[part] = grad_logits @ weight_VD
            if grad_weight is not None:
                grad_weight += (grad_logits.T @ hidden_ND[part]).float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def linear_logp(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, scale: float = 1.0) -> Tensor:
    """float32 [N]: natural log-prob of `target_N` under softmax(hidden @ weight.T * scale).

    Memory beyond the inputs: one chunk of logits forward, one backward, whatever N is.
    """
    result: Tensor = _LinearLogp.apply(hidden_ND, weight_VD, target_N, scale)  # type: ignore[no-untyped-call]
    return result
