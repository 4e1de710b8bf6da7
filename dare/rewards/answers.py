"""Does a completion give the reference answer? For tasks whose rows bring one. Any text is scored in linear time."""

from __future__ import annotations

import re
from fractions import Fraction

from dare.core.text import Reward

_NUMBER = re.compile(r"(?<![0-9.,])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
_MAX_DIGITS = 40
_MAX_CHARS = 10_000  # of the end of a completion, where the last number is


def exact(answer: str, completion: str) -> Reward:
    """1 if the completion is the answer, white space around it aside."""
    is_right = completion.strip() == answer.strip()
    return Reward(float(is_right), is_right)


def number(answer: str, completion: str) -> Reward:
    """1 if the last number of the completion equals the last one of the answer (GSM8K: `#### 1,200`).

    Numbers are compared exactly: 1,200 = 1200.0. Part `format`: whether there is a number at all.
    """
    expected, given = last_number(answer), last_number(completion)
    is_right = given is not None and given == expected
    return Reward(float(is_right), is_right, {"format": float(given is not None)})


def last_number(text: str) -> Fraction | None:
    """The last plain number in ASCII digits; None without one, or if it has more than 40 characters."""
    found = _NUMBER.findall(text[-_MAX_CHARS:])
    if not found or len(found[-1]) > _MAX_DIGITS:
        return None
    return Fraction(found[-1].replace(",", ""))
