"""More plans, built from the parts of `corrupt.py`: orders, blocks and quadrature.

    plan            masked                                                 weight of a scored log-prob
    left_to_right   the position and everything after it in its unit       1
    sample_views    (a subset of another plan's views)                     that plan's, divided by the inclusion rate
    random_step     the tokens of a random step of its unit and later ones  number of steps
    quadrature      each token with the probability of a Gauss node        w_n / t_n
    block_random    a random part of one block, and all later blocks       1

Unit, keys and axes are those of `corrupt.py`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import GIVEN, UNSAMPLED, Samples, Views
from dare.diffusion import corrupt

if TYPE_CHECKING:
    from torch import Tensor


def left_to_right(samples: Samples, is_target_BS: Tensor, *, temperature: float = 1.0) -> Views:
    """One view per position of a unit, which masks that position and all later ones of the unit and scores it.

    The sum over a sample's views is the exact log-likelihood of left-to-right sampling, one token per step: on a
    full-attention model over the completion (L views), on a block model inside each block given the clean blocks
    before it, all blocks in the same view (K views).
    """
    canvas = samples.canvas
    column_BS = torch.arange(canvas.length, device=canvas.input_BS.device).expand_as(canvas.input_BS)
    is_sampled_BS = canvas.input_BS != samples.mask_id
    step_map_BS = torch.where(is_sampled_BS, column_BS, UNSAMPLED).where(canvas.is_completion_BS, GIVEN)
    ordered = dataclasses.replace(samples, step_map_BS=step_map_BS)
    return corrupt.trace_replay(ordered, is_target_BS, temperature=temperature)


def sample_views(views: Views, samples: Samples, key: Key, *, num: int) -> Views:
    """`num` of each sample's T views, evenly spaced from a random start; weights times T / num.

    Every view is kept with probability num / T, so a weighted sum over the kept views is an unbiased estimate of the
    sum over all of them. Samples with at most `num` views keep them, at their own weight. `views` are sample-major.
    """
    batch_size, device = samples.canvas.batch_size, views.sample_R.device
    total_B = torch.bincount(views.sample_R, minlength=batch_size)
    start_B = total_B.cumsum(0) - total_B
    scale_B = (total_B.double() / num).clamp(min=1.0)
    uniform_B = key.uniform(samples.sample_id_B)
    point_BN = ((uniform_B[:, None] + torch.arange(num, device=device)) * scale_B[:, None]).floor().long()
    is_used_BN = point_BN < total_B[:, None]
    is_kept_R = (total_B <= num)[views.sample_R]
    is_kept_R[(start_B[:, None] + point_BN)[is_used_BN]] = True
    weight_RS = (views.weight_RS.double() * scale_B[views.sample_R, None]).float()
    return dataclasses.replace(views, weight_RS=weight_RS).rows(is_kept_R)


def random_step(samples: Samples, key: Key, *, num_views: int, tokens_per_step: int) -> Views:
    """`num_views` views per sample: each unit at a random step of a random-order trajectory.

    A unit of n scored tokens is committed in a random order, `tokens_per_step` at a time, the last step taking what is
    left. A view masks one step's tokens and all later ones and scores that step's, with weight steps / num_views: its
    sum estimates the trajectory's log-likelihood without bias. With one token per step that is the ELBO.
    """
    scope = corrupt.scored_scope(samples)
    unit_BS = corrupt.unit_of(samples)
    rank_BMS = corrupt.random_ranks(samples, key.fold("mask"), scope.is_maskable_BS, unit_BS, num_views)
    size_BS, _ = corrupt.unit_sizes(unit_BS, scope.is_maskable_BS)
    num_steps_B1S = ((size_BS + tokens_per_step - 1) // tokens_per_step).clamp(min=1)[:, None]
    view_1M1 = torch.arange(num_views, device=unit_BS.device)[None, :, None]
    sample_id_B11 = samples.sample_id_B[:, None, None]
    step_BMS = key.fold("step").integers(0, num_steps_B1S, sample_id_B11, view_1M1, unit_BS[:, None])
    is_maskable_B1S = scope.is_maskable_BS[:, None]
    is_masked_BMS = (rank_BMS // tokens_per_step >= step_BMS) & is_maskable_B1S
    is_target_BMS = is_masked_BMS & (rank_BMS // tokens_per_step == step_BMS)
    weight_BMS = (num_steps_B1S.double() / num_views).expand_as(rank_BMS)
    return corrupt.assemble(samples, is_masked_BMS, is_target_BMS, weight_BMS)


def gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    """float64 [N] nodes in (0, 1) and weights with sum 1: exact for polynomials of degree <= 2N - 1.

    Eigenvalues of the Jacobi matrix of the Legendre polynomials (Golub and Welsch 1969).
    """
    index = torch.arange(1, num_nodes, dtype=torch.float64)
    beside = index / (4 * index.square() - 1).sqrt()
    node_N, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (node_N + 1) / 2, vectors[0].square()


def quadrature(samples: Samples, key: Key, *, num_nodes: int, scope: corrupt.Scope, temperature: float = 1.0) -> Views:
    """`num_nodes` views per sample: each maskable position masked with probability t_n, weight w_n / t_n.

    t_n, w_n are the Gauss-Legendre nodes and weights on [0, 1]. The mean over masks of the sum over a unit's views is
    a polynomial in t, so it is the ELBO exactly wherever n <= 2 num_nodes (GDPO, Rojas et al. 2025).
    """
    device = samples.canvas.input_BS.device
    t_M, share_M = (value.to(device) for value in gauss_legendre(num_nodes))
    uniform_BMS = corrupt.position_uniform(samples, key.fold("mask"), num_nodes)
    weight_BMS = (share_M / t_M)[None, :, None].expand_as(uniform_BMS)
    return corrupt.scoped_views(samples, scope, uniform_BMS < t_M[None, :, None], weight_BMS, temperature)


def block_random(
    samples: Samples,
    key: Key,
    *,
    num_views: int,
    min_ratio: float = 0.0,
    prompt_noise: float = 0.0,
    is_published: bool = False,
    temperature: float = 1.0,
) -> Views:
    """`num_views` views per sample, each the state of a block-by-block rollout at a random block (SPG).

    Full attention: block b is drawn without replacement from the blocks that hold a scored token; l of its n scored
    tokens are masked, l uniform on {max(1, floor(n min_ratio))..n}; later blocks and the tail after the first EOS are
    masked, and earlier tokens, prompt included, with probability `prompt_noise`. Block models see clean blocks before
    each block by themselves: every block is drawn in every view, and only the prompt is noised, in both streams.

    Targets: masked scored tokens of blocks <= b. With `is_published` those of all blocks, and b is the entry of a
    permutation of all blocks modulo the number of blocks with a scored token, which favours the first ones.
    """
    canvas, scope = samples.canvas, corrupt.completion_scope(samples, "keep_masked")
    block_BS = torch.where(canvas.is_completion_BS, canvas.block_BS, 0)
    rank_BMS = corrupt.random_ranks(samples, key.fold("mask"), scope.is_maskable_BS, block_BS, num_views)
    size_B1S = corrupt.unit_sizes(block_BS, scope.is_maskable_BS)[0][:, None]
    lowest_B1S = (size_B1S * min_ratio).floor().long().clamp(min=1)
    view_1M1 = torch.arange(num_views, device=block_BS.device)[None, :, None]
    count_BMS = key.fold("count").integers(
        0, size_B1S - lowest_B1S + 1, samples.sample_id_B[:, None, None], view_1M1, block_BS[:, None]
    )
    is_drawn_BMS = (rank_BMS < lowest_B1S + count_BMS) & scope.is_maskable_BS[:, None]
    is_noise_BMS = corrupt.position_uniform(samples, key.fold("noise"), num_views) < prompt_noise
    is_before_BMS = (canvas.is_real_BS & ~canvas.is_completion_BS)[:, None]
    is_scored_BMS = scope.is_target_BS[:, None]
    if not canvas.is_blockwise:
        chosen_BM1 = _random_blocks(samples, key.fold("block"), block_BS, num_views, is_published)[..., None]
        is_drawn_BMS = (is_drawn_BMS & (block_BS[:, None] == chosen_BM1)) | (block_BS[:, None] > chosen_BM1)
        is_before_BMS = is_before_BMS | (canvas.is_completion_BS[:, None] & (block_BS[:, None] < chosen_BM1))
        if not is_published:
            is_scored_BMS = is_scored_BMS & (block_BS[:, None] <= chosen_BM1)
    is_noise_BMS = is_noise_BMS & is_before_BMS
    is_masked_BMS = (is_drawn_BMS & canvas.is_completion_BS[:, None]) | scope.is_hidden_BS[:, None]
    return corrupt.assemble(
        samples,
        is_masked_BMS,
        (is_masked_BMS | is_noise_BMS) & is_scored_BMS,
        torch.ones_like(is_masked_BMS, dtype=torch.float32),
        is_noise_BMS=is_noise_BMS,
        temperature=temperature,
    )


def _random_blocks(samples: Samples, key: Key, block_BS: Tensor, num_views: int, is_published: bool) -> Tensor:
    """int64 [B, M]: the block of each view; 0 for samples without a scored token."""
    is_completion_BS = samples.canvas.is_completion_BS
    block_U = torch.arange(int(block_BS.max()) + 1, device=block_BS.device)
    is_here_BSU = block_BS[..., None] == block_U
    is_scored_BU = (is_here_BSU & (samples.is_scored_BS & is_completion_BS)[..., None]).any(1)
    is_candidate_BU = (is_here_BSU & is_completion_BS[..., None]).any(1) if is_published else is_scored_BU
    uniform_BU = key.uniform(samples.sample_id_B[:, None], block_U)
    order_BU = torch.where(is_candidate_BU, uniform_BU, torch.inf).argsort(dim=-1, stable=True)
    view_1M = torch.arange(num_views, device=block_BS.device)[None]
    chosen_BM: Tensor = order_BU.gather(1, view_1M % is_candidate_BU.sum(-1, keepdim=True).clamp(min=1))
    if is_published:
        chosen_BM = chosen_BM % is_scored_BU.sum(-1, keepdim=True).clamp(min=1)
    return chosen_BM
