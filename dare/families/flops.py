"""Arithmetic that an update needs, whatever it is run with: the numerator of a utilisation (MFU)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dare.core.types import Canvas, Views
from dare.families.base import Family
from dare.families.layers.moe import Experts, Router
from dare.families.network import Network

_KEYS_AND_VALUES = ("k_proj", "v_proj", "query_key_value")  # matrices whose result every token needs


def active_parameters(family: Family) -> tuple[float, float]:
    """Numbers in the matrices that one token is multiplied by, all and trained ones; embedding and head aside.

    Of a mixture's experts those that a token is sent to count, not all of them.
    """
    return _active(family.network, family.network)


def _active(network: Network, part: nn.Module) -> tuple[float, float]:
    """`active_parameters` of a part of the network."""
    per_token = next((module.experts_per_token for module in network.modules() if isinstance(module, Router)), 0)
    total = trained = 0.0
    for module in part.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2 or parameter is network.head_weight:
                continue
            used = parameter.numel() * (per_token / len(parameter) if isinstance(module, Experts) else 1.0)
            total += used
            trained += used * parameter.requires_grad
    return total, trained


def training_flops(family: Family, views: Views, canvas: Canvas) -> float:
    """Floating-point operations of one forward and backward of the views; `canvas` has a row for each of them.

    Matrix products and attention scores of real tokens: no padding, nothing that is computed again. A block model's
    clean stream counts once per sample. Of the last layer targets count, and the keys and values of the others; so do
    all of a matrix that makes queries, keys and values at once. The backward costs as much as the forward for
    activations, and again for weights that are trained. An operation is a multiplication or an addition.
    """
    total, trained = active_parameters(family)
    length_R, num_R = canvas.is_real_BS.sum(-1).double(), views.is_target_RS.sum(-1).double()
    block_length = family.spec.block_length
    if canvas.is_blockwise:
        clean_R = torch.where(_is_first(views.sample_R), length_R, 0.0)
        num_tokens = float((length_R + clean_R).sum())
        num_pairs = float(((length_R + clean_R) * (length_R + block_length) / 2).sum())
        num_read_pairs = float((num_R * (length_R + block_length) / 2).sum())
    else:
        num_tokens, num_pairs = float(length_R.sum()), float(length_R.square().sum())
        num_read_pairs = float((num_R * length_R).sum())
    network, head = family.network, family.network.head_weight
    pairs = num_pairs * (network.num_layers - 1) + num_read_pairs
    attention = 4.0 * pairs * network.num_heads * network.head_dim
    num_targets = float(num_R.sum())
    spared, spared_trained = _read_only(network)
    layers = 2.0 * num_tokens * (2.0 * total + trained) + 3.0 * attention
    layers -= 2.0 * (num_tokens - num_targets) * (2.0 * spared + spared_trained)
    return layers + 2.0 * num_targets * head.numel() * (2.0 + head.requires_grad)


def _read_only(network: Network) -> tuple[float, float]:
    """`active_parameters` of the last layer's matrices that only run where it is read."""
    last = network.layers[-1]
    counts = _active(network, last)
    for name, module in last.named_modules():
        if name.endswith(_KEYS_AND_VALUES):
            counts = (counts[0] - _active(network, module)[0], counts[1] - _active(network, module)[1])
    return counts


def _is_first(sample_R: Tensor) -> Tensor:
    """bool [R]: whether each view is the first of its sample."""
    distinct, place_R = torch.unique(sample_R, return_inverse=True)
    index_R = torch.arange(len(sample_R))
    first = torch.full((len(distinct),), len(sample_R)).scatter_reduce(0, place_R, index_R, reduce="amin")
    return torch.zeros(len(sample_R), dtype=torch.bool).index_fill(0, first, True)
