"""Estimators of KL(policy || reference) from the log-probs of the policy's own samples.

With d = log policy - log reference of one sample (nats): k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman 2020).
k1 and k3 are unbiased, k2 and k3 never negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from dare.core.errors import unknown_name
from dare.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda difference: difference,
    "k2": lambda difference: difference.square() / 2,
    "k3": lambda difference: torch.expm1(-difference) + difference,
}


def estimate_kl(name: str, difference: Tensor) -> Tensor:
    """The estimate for each element of `difference` = log policy - log reference, nats.

    Raises DareError for an unknown estimator.
    """
    if name not in ESTIMATORS:
        raise unknown_name("KL estimator", name, ESTIMATORS)
    return ESTIMATORS[name](difference)
