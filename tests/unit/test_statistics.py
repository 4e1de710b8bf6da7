"""Statistics over few seeds: exact where stated, against closed forms and brute force."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.studies.statistics import bootstrap, holm, paired_t, ranks, sign_flip

VALUES = st.lists(st.floats(-1, 1), min_size=2, max_size=6)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_interval_holds_the_mean_and_stays_in_the_range(values: list[float]) -> None:
    found = bootstrap(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
    assert min(values) - 1e-12 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= max(values) + 1e-12


@settings(max_examples=20, deadline=None)
@given(VALUES, st.floats(-2, 2), st.floats(0.1, 3))
def test_interval_moves_with_the_data(values: list[float], shift: float, scale: float) -> None:
    before, after = bootstrap(values), bootstrap([scale * value + shift for value in values])
    assert after.low == pytest.approx(scale * before.low + shift, abs=1e-9)
    assert after.high == pytest.approx(scale * before.high + shift, abs=1e-9)


def test_one_value_and_none() -> None:
    assert bootstrap([0.3]) == (0.3, 0.3, 0.3)
    with pytest.raises(ValueError, match="no value"):
        bootstrap([])


@pytest.mark.parametrize(("num", "least"), [(5, 0.88), (8, 0.91)])
def test_interval_covers_the_mean_about_as_often_as_it_says(num: int, least: float) -> None:
    """Normal data, 400 intervals; a plain percentile bootstrap of five values covers 83 %."""
    samples = np.random.default_rng(num).normal(size=(400, num))
    intervals = [bootstrap(list(sample)) for sample in samples]
    coverage = sum(low <= 0.0 <= high for _, low, high in intervals) / len(intervals)
    assert least <= coverage <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=7))
def test_sign_flip_is_the_enumeration(differences: list[float]) -> None:
    observed = abs(sum(differences)) - 1e-9
    all_signs = list(itertools.product((1, -1), repeat=len(differences)))
    extreme = sum(abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= observed for sign in all_signs)
    assert sign_flip(differences) == pytest.approx(extreme / len(all_signs))


def test_sign_flip_limits() -> None:
    assert sign_flip([]) == 1.0
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([0.1] * 5) == 2 / 2**5
    many = sign_flip([0.1] * 30)
    assert 0 < many < 1e-3
    assert many == sign_flip([0.1] * 30)
    assert sign_flip([0.1, -0.1] * 15) > 0.5


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.1, 0.3], 0.2951672353),  # one degree of freedom: 1 - 2 / pi * atan(2)
        ([0.1, 0.2, 0.3], 0.0741799002),  # two: 1 - t / sqrt(2 + t^2), t = 2 sqrt(3)
        ([1.0, 2.0, 3.0, 4.0], 0.0304662),  # t = 3.872983, three degrees of freedom
        ([0.5, -0.2, 0.3, 0.1, 0.4], 0.1509441),  # four: 1 - s (1 + c^2 / 2), s and c of atan(t / 2), t = 1.772811
    ],
)
def test_paired_t_by_hand(differences: list[float], p: float) -> None:
    assert paired_t(differences) == pytest.approx(p, abs=2e-7)
    assert paired_t([-value for value in differences]) == pytest.approx(p, abs=2e-7)


@pytest.mark.parametrize(("num", "quantile"), [(2, 12.7062), (4, 3.18245), (5, 2.77645), (9, 2.30600), (30, 2.04523)])
def test_paired_t_at_its_quantiles(num: int, quantile: float) -> None:
    """Differences whose t is the 97.5 % quantile of Student's distribution: p = 0.05."""
    noise = np.random.default_rng(num).normal(size=num)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    assert paired_t(list(noise + quantile / num**0.5)) == pytest.approx(0.05, abs=1e-5)


def test_paired_t_limits() -> None:
    assert paired_t([]) == paired_t([0.4]) == paired_t([0.0, 0.0]) == 1.0
    assert paired_t([0.1] * 4) == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks_share_ties() -> None:
    assert ranks([0.3, 0.9, 0.3, 0.1]) == [2.5, 1.0, 2.5, 4.0]
