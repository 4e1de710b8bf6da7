"""Confidence intervals and tests for solve rates and means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dare.core.rng import Key

_Z95 = 1.959963984540054
_NUM_RESAMPLES = 2000


def wilson(num_solved: int, num: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) without observations."""
    if num == 0:
        return 0.0, 1.0
    rate = num_solved / num
    centre = rate + _Z95**2 / (2 * num)
    spread = _Z95 * math.sqrt(rate * (1 - rate) / num + _Z95**2 / (4 * num**2))
    scale = 1 + _Z95**2 / num
    low = 0.0 if num_solved == 0 else (centre - spread) / scale
    high = 1.0 if num_solved == num else (centre + spread) / scale
    return low, high


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over documents: 2000 resamples, the same for equal input.

    `values` has one number per document, such as the mean over its samples: samples of one document depend on one
    another, documents do not. (0, 1) without observations.
    """
    import numpy as np

    if not values:
        return 0.0, 1.0
    # NumPy's own generator, seeded by a key: nothing global is read or written.
    generator = np.random.default_rng(Key(seed).fold("bootstrap", len(values)).python_seed())
    data = np.asarray(values, dtype=np.float64)
    # As counts of how often each document is drawn: memory for 2000 x the number of documents, not for copies.
    counts = generator.multinomial(len(data), np.full(len(data), 1.0 / len(data)), size=_NUM_RESAMPLES)
    low, high = np.quantile(counts @ data / len(data), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson where every value is 0 or 1, the bootstrap otherwise."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values)


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right (Chen et al. 2021, eq. 1)."""
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test on the documents where two models differ; 1 if they never do."""
    num = num_only_first + num_only_second
    if num == 0:
        return 1.0
    tail = sum(math.comb(num, i) for i in range(min(num_only_first, num_only_second) + 1))
    return float(min(1.0, 2 * tail / 2**num))


def paired_bootstrap(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first over documents, with its 95 % percentile interval."""
    differences = [after - before for before, after in zip(first, second, strict=True)]
    low, high = bootstrap(differences)
    return math.fsum(differences) / len(differences), low, high
