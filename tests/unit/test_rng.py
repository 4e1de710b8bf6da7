"""Counter-based randomness: pure functions of the key, uniform, independent, blind to batch shape."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dare.core.rng import Key, stable_id


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**62), min_size=1, max_size=6), st.integers(1, 8))
def test_draws_do_not_depend_on_the_batch(seed: int, ids: list[int], width: int) -> None:
    key = Key(seed).fold("views", 3)
    id_B1 = torch.tensor(ids)[:, None]
    together = key.uniform(id_B1, torch.arange(width))
    alone = torch.stack([key.uniform(torch.tensor([one]), torch.arange(width)) for one in ids])
    wider = key.uniform(id_B1, torch.arange(width + 5))[:, :width]
    assert torch.equal(together, alone)
    assert torch.equal(together, wider)


def test_uniform_has_the_moments_and_the_range_of_a_uniform() -> None:
    draw = Key(1).uniform(torch.arange(400)[:, None], torch.arange(500))
    assert draw.min() >= 0
    assert draw.max() < 1
    assert abs(float(draw.mean()) - 0.5) < 4 * (1 / 12 / draw.numel()) ** 0.5
    counts = torch.histc(draw.float(), bins=64, min=0, max=1)
    expected = draw.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5


def test_neighbouring_counters_and_streams_are_uncorrelated() -> None:
    rows = torch.cat(
        [
            Key(0).uniform(torch.arange(8)[:, None], torch.arange(4000)),
            Key(1).uniform(torch.arange(8)[:, None], torch.arange(4000)),
            Key(0).fold(0).uniform(torch.arange(8)[:, None], torch.arange(4000)),
        ]
    )
    correlation = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / 4000**0.5


def test_every_part_of_the_path_matters() -> None:
    keys = [Key(0), Key(1), Key(0).fold(0), Key(0).fold(1), Key(0).fold("a"), Key(0).fold("a", 0), Key(0).fold(0, "a")]
    assert len({key.python_seed() for key in keys}) == len(keys)
    assert Key(0).fold("a", 0) == Key(0).fold("a").fold(0)


@given(st.integers(0, 2**40), st.integers(0, 50))
def test_permutation_is_one(seed: int, n: int) -> None:
    assert sorted(Key(seed).permutation(n)) == list(range(n))


def test_integers_cover_their_range_evenly() -> None:
    draw = Key(3).integers(2, 7, torch.arange(50_000))
    counts = torch.bincount(draw, minlength=7)
    assert counts[:2].sum() == 0
    assert float((counts[2:] - 10_000).abs().max()) < 5 * 10_000**0.5


def test_global_generators_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    Key(0).uniform(torch.arange(10))
    assert torch.equal(before, torch.random.get_rng_state())


def test_stable_ids_are_stable() -> None:
    assert stable_id("countdown/train/17", 3) == 3878763717384269520
    assert stable_id("a", "b") != stable_id("ab")
    assert stable_id(1) >= 0
