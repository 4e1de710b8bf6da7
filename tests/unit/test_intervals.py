"""Wilson intervals against known values and their defining equation."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare.evals.intervals import wilson


def test_known_values() -> None:
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_solve_the_score_equation(counts: tuple[int, int]) -> None:
    num_solved, num = counts
    low, high = wilson(num_solved, num)
    rate = num_solved / num
    assert 0.0 <= low <= rate <= high <= 1.0
    for bound in (low, high):
        if 0.0 < bound < 1.0:
            assert abs(rate - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / num), rel=1e-6
            )
