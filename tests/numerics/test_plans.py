"""Corruption plans: exact laws, coverage, weights, and independence of everything but the key and the sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, plans, supervised
from dare.diffusion.schedule import SCHEDULES, find_schedule, spread_time
from dare.diffusion.supervised import Noise
from tests.numerics import toy

PLANS: dict[str, Callable[[Samples, Key], Views]] = {
    "all_masked": lambda samples, key: corrupt.all_masked(samples, key, prompt_noise=0.5),
    "bernoulli": lambda samples, key: corrupt.bernoulli(samples, key, num_views=3),
    "bernoulli_independent": lambda samples, key: corrupt.bernoulli(samples, key, num_views=2, is_stratified=False),
    "complementary": lambda samples, key: supervised.noised(samples, key, Noise(num_views=4, is_complementary=True)),
    "coupled": lambda samples, key: corrupt.coupled_bernoulli(
        samples, key, num_pairs=2, t_min=0.2, t_max=0.8, weight=0.2
    ),
    "exact_count": lambda samples, key: corrupt.exact_count(samples, key, num_views=3),
    "coupled_exact_count": lambda samples, key: corrupt.coupled_exact_count(
        samples, key, num_pairs=2, scope=corrupt.completion_scope(samples, "scored")
    ),
    "trace_replay": lambda samples, key: corrupt.trace_replay(samples, samples.is_scored_BS),
    "trace_shrunk": lambda samples, key: corrupt.trace_replay(samples, samples.is_scored_BS, shrink=2),
    "left_to_right": lambda samples, key: plans.left_to_right(samples, samples.is_scored_BS),
    "sample_views": lambda samples, key: plans.sample_views(
        plans.left_to_right(samples, samples.is_scored_BS), samples, key, num=2
    ),
    "quadrature": lambda samples, key: plans.quadrature(
        samples, key, num_nodes=3, scope=corrupt.completion_scope(samples, "keep_masked")
    ),
    "block_random": lambda samples, key: plans.block_random(samples, key, num_views=2, prompt_noise=0.3),
    "block_random_published": lambda samples, key: plans.block_random(
        samples, key, num_views=2, prompt_noise=0.3, is_published=True
    ),
}
DETERMINISTIC = ("trace_replay", "trace_shrunk", "left_to_right")

all_plans = pytest.mark.parametrize("plan", list(PLANS))
all_blocks = pytest.mark.parametrize("block_length", [None, 1, 3, 4])


def ragged(block_length: int | None, *, num_padding: int = 0, rows: tuple[int, ...] = (0, 1, 2, 3)) -> Samples:
    """Four samples of unequal lengths, two with a tail after the first EOS."""
    prompts = [[2], [0, 1, 2], [1, 1], [2, 0, 2, 1, 0]]
    completions = [[0, 2, 1, 0, 1, 1], [1, 0, 0, 2], [2] * 8, [0, 1, 2, 0, 0, 1, 2]]
    scored = [6, 3, 8, 4]
    step_maps = [[0, 1, 1, 4, 2, 2], [3, 3, 0, 1], [0, 5, 2, 2, 4, 4, 3, 1], [2, 1, 0, 0, 1, 2, 7]]
    return toy.make_samples(
        [completions[row] for row in rows],
        prompts=[prompts[row] for row in rows],
        scored_lengths=[scored[row] for row in rows],
        step_maps=[step_maps[row] for row in rows],
        sample_ids=[100 + row for row in rows],
        block_length=block_length,
        num_padding=num_padding,
    )


def views_of(views: Views, row: int, length: int) -> list[tuple[object, ...]]:
    """Everything that defines the views of a sample, cut to its real positions."""
    chosen = views.rows((views.sample_R == row).nonzero()[:, 0])
    fields = (chosen.noisy_RS, chosen.context_RS, chosen.target_RS, chosen.is_target_RS, chosen.weight_RS)
    return [*(field[:, :length].tolist() for field in fields), chosen.view_R.tolist()]


@all_plans
@all_blocks
def test_a_sample_has_the_same_views_in_any_batch(plan: str, block_length: int | None) -> None:
    key = Key(11).fold("views")
    whole = ragged(block_length)
    reference = PLANS[plan](whole, key)
    for rows, num_padding in (((3, 1, 0, 2), 0), ((0, 1, 2, 3), 7), ((2, 0), 3), ((1,), 0)):
        samples = ragged(block_length, num_padding=num_padding, rows=rows)
        views = PLANS[plan](samples, key)
        for index, row in enumerate(rows):
            length = int(samples.canvas.is_real_BS[index].sum())
            assert views_of(views, index, length) == views_of(reference, row, length)


@all_plans
@all_blocks
def test_views_are_well_formed(plan: str, block_length: int | None) -> None:
    samples = ragged(block_length, num_padding=2)
    state = torch.random.get_rng_state()
    views = PLANS[plan](samples, Key(2))
    assert torch.equal(state, torch.random.get_rng_state())
    clean_RS = samples.canvas.input_BS[views.sample_R]
    is_masked_RS = views.noisy_RS == toy.MASK
    assert torch.equal(views.target_RS, clean_RS)
    assert torch.equal(views.noisy_RS[~is_masked_RS], clean_RS[~is_masked_RS])
    assert bool(is_masked_RS[views.is_target_RS].all())
    assert bool((views.weight_RS[views.is_target_RS] > 0).all())
    assert bool((views.weight_RS[~views.is_target_RS] == 0).all())
    assert not bool((views.is_target_RS & ~samples.canvas.is_completion_BS[views.sample_R]).any())
    assert not bool((is_masked_RS & ~samples.canvas.is_real_BS[views.sample_R]).any())
    assert views.sample_R.tolist() == sorted(views.sample_R.tolist())
    if plan not in ("all_masked", "block_random", "block_random_published"):
        assert torch.equal(views.context_RS, clean_RS)
        assert not bool((is_masked_RS & ~samples.canvas.is_completion_BS[views.sample_R]).any())
    if plan not in ("coupled_exact_count",):
        assert not bool((views.is_target_RS & ~samples.is_scored_BS[views.sample_R]).any())


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan not in DETERMINISTIC])
def test_views_differ_between_keys_and_samples(plan: str) -> None:
    samples = toy.make_samples([[0] * 40] * 2, prompts=[[1] * 40] * 2, sample_ids=[7, 8])
    first, second = PLANS[plan](samples, Key(0)), PLANS[plan](samples, Key(1))
    assert not torch.equal(first.noisy_RS, second.noisy_RS)
    assert torch.equal(first.noisy_RS, PLANS[plan](samples, Key(0)).noisy_RS)
    half = first.num_views // 2
    assert not torch.equal(first.noisy_RS[:half], first.noisy_RS[half:])


@pytest.mark.parametrize(
    ("plan", "first", "second"),
    [
        ("bernoulli", 0, 1),
        ("bernoulli_independent", 0, 1),
        ("exact_count", 0, 2),
        ("complementary", 0, 2),
        ("coupled", 1, 3),
        ("coupled_exact_count", 0, 2),
    ],
)
def test_views_of_a_sample_draw_their_own_masks(plan: str, first: int, second: int) -> None:
    """Two masks from the same uniforms would be nested in one another whatever their sizes."""
    samples = toy.make_samples([[0] * 40] * 8)
    views = PLANS[plan](samples, Key(3))
    is_target_BMS = views.is_target_RS.view(8, -1, views.target_RS.shape[1])
    one_BS, other_BS = is_target_BMS[:, first], is_target_BMS[:, second]
    assert bool(((one_BS & ~other_BS).any(-1) & (other_BS & ~one_BS).any(-1)).any())


@all_blocks
def test_every_scored_token_is_covered(block_length: int | None) -> None:
    samples = ragged(block_length)

    def times_scored(views: Views) -> Tensor:
        zero_BS = torch.zeros(samples.canvas.input_BS.shape, dtype=torch.int64)
        return zero_BS.index_add(0, views.sample_R, views.is_target_RS.long())

    scored_BS = samples.is_scored_BS.long()
    assert torch.equal(times_scored(PLANS["complementary"](samples, Key(4))), 2 * scored_BS)
    assert torch.equal(times_scored(PLANS["coupled"](samples, Key(4))), 3 * scored_BS)
    completion_BS = samples.canvas.is_completion_BS.long()
    assert torch.equal(times_scored(PLANS["coupled_exact_count"](samples, Key(4))), 2 * completion_BS)
    assert torch.equal(times_scored(PLANS["trace_replay"](samples, Key(4))), scored_BS)
    assert torch.equal(times_scored(PLANS["trace_shrunk"](samples, Key(4))), scored_BS)
    assert torch.equal(times_scored(PLANS["left_to_right"](samples, Key(4))), scored_BS)
    assert torch.equal(times_scored(PLANS["all_masked"](samples, Key(4))), scored_BS)


@pytest.mark.parametrize("lowest", [0, 1])
def test_every_view_visits_every_count_equally_often(lowest: int) -> None:
    for size in range(1, 17):
        num_counts = size + 1 - lowest
        first = (torch.arange(num_counts)[:, None] + 0.5) / num_counts
        for num_views in range(1, 17):
            counts = corrupt.stratified_counts(first, torch.tensor(size), num_views, lowest, torch.arange(num_views))
            assert counts.shape == (num_counts, num_views)
            expected = torch.arange(lowest, size + 1)
            assert torch.equal(counts.sort(dim=0).values, expected[:, None].expand(-1, num_views))
            if num_views == num_counts:
                assert torch.equal(counts.sort(dim=1).values, expected.expand(num_counts, -1))


def test_count_offsets_round_down() -> None:
    counts = corrupt.stratified_counts(torch.zeros(()), torch.tensor(5), 2, 1, torch.arange(2))
    assert counts.tolist() == [1, 3]  # 1 + floor(5 / 2); rounding 2.5 half to even also gives 3, but 7.5 gives 8
    counts = corrupt.stratified_counts(torch.zeros(()), torch.tensor(15), 2, 1, torch.arange(2))
    assert counts.tolist() == [1, 8]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    num_views=st.integers(1, 5),
    block_length=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_exact_counts_are_exact_and_weighted(
    lengths: list[int], num_views: int, block_length: int | None, seed: int
) -> None:
    samples = toy.make_samples([[0] * length for length in lengths], block_length=block_length)
    views = corrupt.exact_count(samples, Key(seed), num_views=num_views)
    unit_RS = samples.canvas.block_BS[views.sample_R] if block_length else torch.zeros_like(views.target_RS)
    for row in range(views.num_views):
        is_scored_S = samples.is_scored_BS[views.sample_R[row]]
        for unit in unit_RS[row][is_scored_S].unique().tolist():
            is_unit_S = is_scored_S & (unit_RS[row] == unit)
            size, count = int(is_unit_S.sum()), int(views.is_target_RS[row][is_unit_S].sum())
            assert 1 <= count <= size
            weight_S = views.weight_RS[row][is_unit_S & views.is_target_RS[row]]
            torch.testing.assert_close(weight_S, torch.full_like(weight_S, size / count / num_views))


def test_coupled_counts_weigh_both_halves() -> None:
    samples = toy.make_samples([[0] * 5] * 200)
    views = corrupt.coupled_exact_count(samples, Key(0), num_pairs=2, scope=corrupt.scored_scope(samples))
    size_R = views.is_target_RS.sum(-1)
    assert set(size_R.tolist()) == {0, 1, 2, 3, 4, 5}
    pair = size_R.view(-1, 2)
    assert bool((pair.sum(-1) == 5).all())
    for row in range(views.num_views):
        weight_N = views.weight_RS[row][views.is_target_RS[row]]
        torch.testing.assert_close(weight_N, torch.full_like(weight_N, 6 / (2 * float(size_R[row].clamp(min=1)) * 2)))


def test_exact_count_draws_sets_uniformly() -> None:
    samples = toy.make_samples([[0] * 5] * 6000, block_length=None)
    views = corrupt.exact_count(samples, Key(9), num_views=1)
    counts = Counter(map(tuple, views.is_target_RS[:, 1:].tolist()))
    assert len(counts) == 31
    expected = {chosen: 6000 / 5 / math.comb(5, sum(chosen)) for chosen in counts}
    chi_square = sum((counts[chosen] - expected[chosen]) ** 2 / expected[chosen] for chosen in counts)
    assert chi_square < 59.7  # 99.9 % quantile, 30 degrees of freedom


@pytest.mark.parametrize("is_time_per_block", [True, False])
def test_times_are_shared_within_their_unit_and_uniform(is_time_per_block: bool) -> None:
    samples = toy.make_samples([[0] * 32] * 500, block_length=8)
    views = corrupt.bernoulli(samples, Key(3), num_views=2, is_time_per_block=is_time_per_block)
    t_RS = torch.where(views.is_target_RS, 0.5 / views.weight_RS, torch.nan)[:, 1:].view(500, 2, 4, 8)
    spread = t_RS.nan_to_num(-1).amax(-1) - t_RS.nan_to_num(2).amin(-1)
    assert float(spread[spread > -2].max()) < 1e-5
    block_t = t_RS.nan_to_num(-1).amax(-1)
    has_all = (block_t > 0).all(-1)
    is_same = (block_t.amax(-1) - block_t.amin(-1) < 1e-5)[has_all]
    assert bool(is_same.all()) != is_time_per_block
    gap = (block_t[:, 1] - block_t[:, 0])[(block_t > 0).all(1)].abs()
    torch.testing.assert_close(gap, torch.full_like(gap, 0.4995), rtol=0, atol=1e-4)  # stratified: half apart
    rate_BM = views.is_target_RS.float().sum(-1).view(500, 2) / 32
    for view in range(2):
        assert abs(float(rate_BM[:, view].mean()) - 0.5) < 4 * float(rate_BM[:, view].std()) / math.sqrt(500)


def test_prompt_noise_enters_both_streams() -> None:
    samples = toy.make_samples([[0, 1]] * 400, prompts=[[1] * 10] * 400, block_length=4)
    views = corrupt.all_masked(samples, Key(0), prompt_noise=0.15)
    is_noise_RS = views.context_RS == toy.MASK
    assert torch.equal(is_noise_RS[:, :10], views.noisy_RS[:, :10] == toy.MASK)
    assert not bool(is_noise_RS[:, 10:].any())
    assert bool((views.noisy_RS[:, 10:] == toy.MASK).all())
    assert abs(float(is_noise_RS[:, :10].float().mean()) - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 4000)


@pytest.mark.parametrize(
    ("tail", "is_masked_always", "is_scored"),
    [("scored", False, True), ("corrupted", False, False), ("keep_masked", True, False)],
)
def test_what_happens_to_the_tail(
    tail: Literal["scored", "corrupted", "keep_masked"], is_masked_always: bool, is_scored: bool
) -> None:
    samples = toy.make_samples([[0, 1, 2, 2, 2, 2]] * 50, scored_lengths=[2] * 50)
    scope = corrupt.completion_scope(samples, tail)
    views = corrupt.coupled_exact_count(samples, Key(1), num_pairs=1, scope=scope)
    is_masked_RT = views.noisy_RS[:, 3:] == toy.MASK
    assert bool(is_masked_RT.all()) == is_masked_always
    assert bool(is_masked_RT.any())
    assert bool(views.is_target_RS[:, 3:].any()) == is_scored
    assert bool(views.is_target_RS[:, 1:3].any())


def test_positions_that_were_never_sampled_are_never_scored() -> None:
    samples = toy.make_samples([[0, 1, toy.MASK, toy.MASK]], step_maps=[[1, 0, -2, -2]])
    plans = {name: plan for name, plan in PLANS.items() if name != "all_masked"}
    for plan in plans.values():
        for seed in range(5):
            views = plan(samples, Key(seed))
            assert bool((views.noisy_RS[:, 3:] == toy.MASK).all())
            assert not bool(views.is_target_RS[:, 3:].any())


def test_trace_views_mask_what_was_not_committed() -> None:
    samples = toy.make_samples([[0, 1, 2, 0, 1, 2]], step_maps=[[0, 1, 1, 5, 3, 3]])
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    assert (views.noisy_RS[:, 1:] == toy.MASK).int().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 0, 0],
    ]
    assert [row.nonzero()[:, 0].tolist() for row in views.is_target_RS] == [[1], [2, 3], [5, 6], [4]]


def test_trace_views_of_blocks_are_replayed_in_parallel() -> None:
    samples = toy.make_samples([[0, 1, 2, 0, 1, 2]], step_maps=[[0, 1, 1, 5, 3, 3]], block_length=3)
    views = corrupt.trace_replay(samples, samples.is_scored_BS)
    assert (views.noisy_RS[:, 1:] == toy.MASK).int().tolist() == [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]
    assert [row.nonzero()[:, 0].tolist() for row in views.is_target_RS] == [[1, 5, 6], [2, 3, 4]]
    with pytest.raises(DareError, match="no step map"):
        corrupt.trace_replay(toy.make_samples(), samples.is_scored_BS)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 10), block_length=st.integers(1, 5))
def test_step_ranks_count_the_distinct_earlier_steps_of_the_block(
    data: st.DataObject, length: int, block_length: int
) -> None:
    step_map = data.draw(st.lists(st.sampled_from([-2, -1, 0, 1, 2, 3, 7]), min_size=length, max_size=length))
    unit = [k // block_length for k in range(length)]
    got = corrupt.step_ranks(torch.tensor([step_map]), torch.tensor([unit]))[0].tolist()
    for k in range(length):
        steps = {step_map[j] for j in range(length) if unit[j] == unit[k] and step_map[j] >= 0}
        assert got[k] == (sorted(steps).index(step_map[k]) if step_map[k] >= 0 else -1)
    relabelled = torch.tensor([[step * 3 + 5 if step >= 0 else step for step in step_map]])
    assert corrupt.step_ranks(relabelled, torch.tensor([unit]))[0].tolist() == got


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_weight_is_the_slope_of_the_mask_probability(name: str) -> None:
    t = torch.linspace(1e-3, 0.999, 200, dtype=torch.float64, requires_grad=True)
    share = find_schedule(name).mask_probability(t)
    (slope,) = torch.autograd.grad(share.sum(), t)
    torch.testing.assert_close(find_schedule(name).loss_weight(t), slope / share, rtol=1e-10, atol=1e-10)
    ends = find_schedule(name).mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_time_spread_and_unknown_schedule() -> None:
    assert spread_time(torch.tensor([0.0, 0.5]), 0.2, 0.8).tolist() == pytest.approx([0.2, 0.5])
    with pytest.raises(DareError, match="unknown schedule 'lineer'") as error:
        find_schedule("lineer")
    assert "did you mean 'linear'" in str(error.value)
