"""A few hostile inputs for everything that is read; `benchmarks/fuzz.py` goes on for as long as it is given."""

from __future__ import annotations

import pytest

from tests.fuzz.runner import fuzz
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_input_is_refused_with_one_message(target: Target) -> None:
    fuzz(target, 15, is_repeatable=True)
