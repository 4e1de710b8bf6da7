"""reasoning-gym datasets by value: a `Source` opens to the same problems in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dare.core.errors import DareError, unknown_name

Entry = dict[str, Any]  # a problem as reasoning-gym returns it: question, answer, metadata


@dataclass(frozen=True, slots=True)
class Source:
    """Everything that determines a dataset's problems."""

    dataset: str  # reasoning-gym's name
    parameters: str  # of the dataset, as JSON: hashable, and ready for another process
    seed: int
    size: int


def source(dataset: str, parameters: Mapping[str, Any], seed: int, size: int) -> Source:
    """The source of `size` problems. Raises DareError for an unknown dataset or parameters that it refuses."""
    made = Source(dataset, json.dumps(dict(parameters), sort_keys=True), seed, size)
    open_source(made)
    return made


@lru_cache(maxsize=16)
def open_source(wanted: Source) -> Any:
    """The reasoning-gym dataset behind a source; `dataset[index]` is a pure function of the index."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if wanted.dataset not in DATASETS:
        raise unknown_name("reasoning-gym dataset", wanted.dataset, DATASETS, where="task.dataset")
    parameters = json.loads(wanted.parameters)
    try:
        return create_dataset(wanted.dataset, seed=wanted.seed, size=wanted.size, **parameters)
    except (TypeError, ValueError, AssertionError) as error:
        raise DareError(
            f"reasoning-gym's {wanted.dataset} refuses its parameters: {error}",
            where="task.parameters",
            got=parameters,
            expected="some of " + ", ".join(DATASETS[wanted.dataset][1].__dataclass_fields__),
        ) from None
