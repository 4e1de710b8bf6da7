"""What a family thinks most likely at the targets of views, one chunk of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dare.core.types import Views
from dare.families.base import Family
from dare.families.layers.head import chunk_rows


def target_argmax(family: Family, hidden_RTD: Tensor, views: Views) -> Tensor:
    """int64 [R, S]: the most likely token at each target from the result of `Family.view_hidden`; 0 elsewhere.

    The mask token may win: then the network knows nothing better, and a draft stays masked there.
    """
    is_target_RT = views.is_target_RS[:, : hidden_RTD.shape[1]].to(family.device)
    chunks = torch.split(hidden_RTD[is_target_RT], chunk_rows(family.spec.vocab_size))
    token_N = torch.cat([family.row_logits(hidden_ND).argmax(-1) for hidden_ND in chunks])
    token_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.int64, device=family.device)
    return token_RS.index_put(is_target_RT.nonzero(as_tuple=True), token_N)
