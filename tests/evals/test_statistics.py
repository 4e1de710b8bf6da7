"""Intervals that cover what they should, and tests with the size they claim (simulated)."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from dare.evals.card import summarize
from dare.evals.intervals import bootstrap, mcnemar, mean_interval, paired_bootstrap, pass_at_k, wilson


@pytest.mark.parametrize(("rate", "num"), [(0.02, 164), (0.3, 50), (0.5, 256), (0.94, 1319)])
def test_wilson_covers_95_percent(rate: float, num: int) -> None:
    solved = np.random.default_rng(1).binomial(num, rate, size=4000)
    covered = [low <= rate <= high for low, high in (wilson(int(k), num) for k in solved)]
    assert 0.925 < sum(covered) / len(covered) < 0.98


@pytest.mark.slow
def test_bootstrap_covers_95_percent() -> None:
    """Documents with 4 samples each: the interval is over documents, as their samples depend on one another."""
    generator = np.random.default_rng(2)
    num_covered = 0
    for _ in range(300):
        difficulty = generator.beta(0.5, 0.5, size=120)
        means = generator.binomial(4, difficulty) / 4
        low, high = bootstrap([float(mean) for mean in means])
        num_covered += low <= 0.5 <= high
    assert 0.91 < num_covered / 300 < 0.985


def test_intervals_are_reproducible_and_ordered() -> None:
    values = [0.0, 0.5, 1.0, 0.25, 0.75]
    assert bootstrap(values) == bootstrap(values)
    low, high = mean_interval(values)
    assert low < 0.5 < high
    assert mean_interval([1.0, 0.0, 1.0]) == wilson(2, 3)
    assert mean_interval([]) == wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("num", "solved", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(num: int, solved: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * solved + [False] * (num - solved), k))
    assert pass_at_k(num, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="at least 7"):
        pass_at_k(num, solved, 7)


def test_mcnemar_by_enumeration() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    for a, b in ((1, 8), (8, 1), (0, 5)):
        tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
        assert mcnemar(a, b) == pytest.approx(2 * tail)


def test_mcnemar_rarely_finds_what_is_not_there() -> None:
    generator = random.Random(4)
    found = 0
    for _ in range(1000):
        first = sum(generator.random() < 0.5 for _ in range(40))
        found += mcnemar(first, 40 - first) < 0.05
    assert found / 1000 < 0.05


def test_paired_differences_are_sharper_than_unpaired() -> None:
    hard = [float(i % 2) for i in range(200)]
    better = [min(1.0, value + (i % 20 == 0)) for i, value in enumerate(hard)]
    difference, low, high = paired_bootstrap(hard, better)
    assert difference == pytest.approx(0.05)
    assert 0 < low < difference < high < 0.1


def test_summary_of_samples() -> None:
    records = [
        {"index": index, "sample": sample, "scores": {"strict": float(sample < index)}}
        for index in range(3)
        for sample in range(4)
    ]
    score = summarize(records)["strict"]
    assert score["mean"] == pytest.approx((0 + 1 + 2) / 12)
    assert score["pass@2"] == pytest.approx((0 + pass_at_k(4, 1, 2) + pass_at_k(4, 2, 2)) / 3)
    assert score["pass@4"] == pytest.approx(2 / 3)
    assert "pass@8" not in score
