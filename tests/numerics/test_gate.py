"""Properties of the specification's list that no other file holds; docs/numerics.md says where each of the list is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.types import Samples
from dare.diffusion import corrupt, likelihood
from dare.diffusion import trace as traces
from dare.families.base import Family
from dare.rollout.engine import denoise
from tests.numerics import toy


def masked_logp(canvas: list[int], tokens: tuple[int, ...]) -> list[float]:
    """Log-probs of `tokens` at the four completion positions of a canvas of the toy."""
    noisy_RS = torch.tensor([[*toy.PROMPT, *canvas]])
    target_RS = torch.tensor([[*toy.PROMPT, *tokens]])
    values: list[float] = toy.logp(noisy_RS, noisy_RS, target_RS, toy.make_samples().canvas, toy.NEW)[0, 1:].tolist()
    return values


def surrogate_sums(canvas: tuple[int, ...], known: dict[tuple[int, ...], list[float]]) -> tuple[int, float]:
    """Trajectories from `canvas` of the sampler that commits its surest candidate, and their summed likelihoods.

    Candidates are drawn for every mask; the one that was likeliest is committed. A trajectory's likelihood is the
    product of its commits' probabilities, as algorithms that replay traces take it.
    """
    free = [k for k in range(4) if canvas[k] == toy.MASK]
    if not free:
        return 1, 1.0
    if canvas not in known:
        rows = [masked_logp(list(canvas), (token,) * 4) for token in range(toy.VOCAB)]
        known[canvas] = [rows[token][k] for k in range(4) for token in range(toy.VOCAB)]
    table = known[canvas]
    commits = set()
    for drawn in itertools.product(range(toy.VOCAB), repeat=len(free)):
        surest = max(zip(free, drawn, strict=True), key=lambda pair: table[pair[0] * toy.VOCAB + pair[1]])
        commits.add(surest)
    num, total = 0, 0.0
    for k, token in commits:
        below = surrogate_sums((*canvas[:k], token, *canvas[k + 1 :]), known)
        num += below[0]
        total += below[1] * math.exp(table[k * toy.VOCAB + token])
    return num, total


def test_traces_of_the_surest_candidate_are_no_likelihood() -> None:
    """The warning of `dare check` about low_confidence and replay: summed over all trajectories 19.2, not 1."""
    num, total = surrogate_sums((toy.MASK,) * 4, {})
    assert num == 699
    assert total == pytest.approx(19.2347091429, abs=1e-9)


@pytest.mark.parametrize("block_length", [None, 2])
def test_random_orders_sum_to_one(block_length: int | None) -> None:
    """The mixture over all orders within blocks is what a sampler of one random token per step draws from."""
    width = block_length or 4
    orders = [
        [step for block in blocks for step in block]
        for blocks in itertools.product(
            *(list(itertools.permutations(range(start, start + width))) for start in range(0, 4, width))
        )
    ]
    samples = toy.make_samples(toy.ALL_COMPLETIONS * len(orders), block_length=block_length)
    step_map_BS = torch.full_like(samples.canvas.input_BS, -1)
    step_map_BS[:, 1:5] = torch.tensor(orders).repeat_interleave(81, 0)
    samples = replace(samples, step_map_BS=step_map_BS)
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    logp_RS = toy.view_logp(views, samples.canvas)
    logp_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)
    torch.testing.assert_close(logp_B.exp().sum() / len(orders), torch.tensor(1.0, dtype=torch.float64))


def replayed(family: Family, samples: Samples) -> Tensor:
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    with torch.no_grad():
        logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    return likelihood.per_token(logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)


def test_a_replay_without_the_tail_of_the_last_block_is_another_policy(families: dict[str, Family]) -> None:
    """The rollout saw the positions after EOS as masks, so cutting them off must show in the log-probs."""
    family = families["sdar"]
    decode = Decode(gen_length=12, block_length=4, steps_per_block=2, unmask="max_prob", temperature=1.0)
    trace = denoise(family, [[1, 2], [3, 4, 5]], decode, Key(1), [0, 1])
    start_B1 = trace.canvas.is_completion_BS.long().argmax(-1, keepdim=True)
    is_head_BS = torch.arange(trace.canvas.length)[None] - start_B1 < 2  # ends in the middle of a block
    is_scored_BS = traces.scored_mask(trace) & is_head_BS
    samples = Samples(
        canvas=trace.canvas,
        is_scored_BS=is_scored_BS,
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.zeros(2),
        group_B=torch.zeros(2, dtype=torch.int64),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
    )
    whole_BS = replayed(family, samples)
    torch.testing.assert_close(whole_BS.float(), trace.logp_BS * is_scored_BS, atol=1e-4, rtol=0)
    is_kept_BS = ~trace.canvas.is_completion_BS | is_head_BS
    canvas = replace(
        trace.canvas,
        is_real_BS=trace.canvas.is_real_BS & is_kept_BS,
        is_completion_BS=trace.canvas.is_completion_BS & is_kept_BS,
    )
    step_map_BS = torch.where(is_kept_BS, trace.step_map_BS, -1)
    cut_BS = replayed(family, replace(samples, canvas=canvas, step_map_BS=step_map_BS))
    assert float((cut_BS - whole_BS).abs().max()) > 1e-3


@pytest.mark.parametrize("power", [0.5, 1.5, 3.0])
def test_the_upper_bound_is_taught_by_the_likelier_views(power: float) -> None:
    """The gradient of SPG's power mean: per token a softmax of power * logp, plus the views' log weights."""
    generator = torch.Generator().manual_seed(0)
    logp_RS = -3 * torch.rand((3, 5), generator=generator, dtype=torch.float64)
    is_target_RS = torch.tensor([[True] * 5, [True, False, True, False, True], [False, True, True, False, False]])
    leaf = logp_RS.requires_grad_()
    length_R, sample_R = torch.tensor([5, 5, 5]), torch.zeros(3, dtype=torch.int64)
    value_B = likelihood.per_token_power_mean(leaf, is_target_RS, length_R, sample_R, 1, power)
    (grad_RS,) = torch.autograd.grad(value_B.sum(), leaf)
    log_weight_R1 = (length_R / is_target_RS.sum(-1)).double().log()[:, None]
    score_RS = torch.where(is_target_RS, power * logp_RS.detach() + log_weight_R1, -torch.inf)
    torch.testing.assert_close(grad_RS, score_RS.softmax(0) / 5)


def test_complementary_masks_lower_the_variance_of_the_elbo() -> None:
    """ESPO's pair against two independent masks, by enumeration on the toy: the variance is 0.524 of theirs."""
    samples = toy.make_samples()
    value: dict[frozenset[int], float] = {frozenset(): 0.0}
    for size in range(1, 5):
        sets = toy.subsets(4, size)
        is_masked_1MS = toy.masks_of(sets, samples)
        views = corrupt.assemble(samples, is_masked_1MS, is_masked_1MS, torch.ones(is_masked_1MS.shape))
        sums = toy.view_logp(views, samples.canvas).sum(-1).tolist()
        value |= {frozenset(chosen): total * 5 / size for chosen, total in zip(sets, sums, strict=True)}
    everything = frozenset(range(4))
    share = {chosen: 1 / 5 / math.comb(4, len(chosen)) for chosen in value}

    def moments(estimate: dict[frozenset[int], float]) -> tuple[float, float]:
        mean = sum(share[chosen] * estimate[chosen] for chosen in share)
        return mean, sum(share[chosen] * (estimate[chosen] - mean) ** 2 for chosen in share)

    single_mean, single_variance = moments(value)
    pair_mean, pair_variance = moments({chosen: (value[chosen] + value[everything - chosen]) / 2 for chosen in share})
    assert single_mean == pytest.approx(-4.4783095268, abs=1e-9)
    assert pair_mean == pytest.approx(-4.4783095268, abs=1e-9)
    assert pair_variance / (single_variance / 2) == pytest.approx(0.5242, abs=1e-4)
