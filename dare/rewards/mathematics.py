r"""Answers to mathematical problems: found in a completion, compared with the gold answer by value.

Two ways of finding the answer, always reported side by side:

    strict    what the prompt asks for: the last \boxed{...}, or the number after the last "####"
    flexible  strict; else what follows the last "answer is"; else the last number

Only the last one counts, so listing many answers wins nothing.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Literal

from dare.rewards.child import Child

MAX_TEXT = 200_000  # characters of a completion that are looked at, from its end
_MAX_BOXES = 100  # unmatched ones cost time
MAX_ANSWER = 400  # characters of an answer; a longer one is none

Equality = Literal["equal", "different", "no_gold"]

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_PHRASE = re.compile(r"answer\s*(?:is|:|=)\s*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_PLAIN = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_MARKUP = str.maketrans("", "", "$*`")


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces match; None if there is none."""
    text = text[-MAX_TEXT:]
    for match in reversed(list(_BOXED.finditer(text))[-_MAX_BOXES:]):
        depth = 1
        for place in range(match.end(), min(len(text), match.end() + MAX_ANSWER + 1)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[match.end() : place].strip() or None
    return None


def strict_answer(text: str) -> str | None:
    r"""The last \boxed{...}, else what stands after the last "####"; None if there is neither."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    found = _HASHES.findall(text[-MAX_TEXT:])
    return _tidy(found[-1]) if found else None


def flexible_answer(text: str) -> str | None:
    """The strict answer, else what follows the last "answer is", else the last number; None if there is nothing."""
    strict = strict_answer(text)
    if strict is not None:
        return strict
    text = text[-MAX_TEXT:]
    phrases = _PHRASE.findall(text)
    if phrases:
        numbers = _NUMBER.findall(phrases[-1])
        return numbers[0] if numbers else _tidy(phrases[-1])
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def number(text: str | None) -> Decimal | None:
    """A plain decimal number, with or without thousands separators, currency or a unit's sign; None for all else.

    ASCII digits only, and no expression: "7 or 8", "2*4" and numbers of other alphabets are no numbers.
    """
    if text is None or len(text) > MAX_ANSWER:
        return None
    plain = text.translate(_MARKUP).replace("\\", "").strip().rstrip(".%").strip()
    if _PLAIN.fullmatch(plain) is None:
        return None
    try:
        return Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None


def equal_numbers(gold: str, answer: str | None) -> Equality:
    """Comparison by value of plain numbers."""
    expected, found = number(gold), number(answer)
    if expected is None:
        return "no_gold"
    return "equal" if found is not None and found == expected else "different"


class MathChecker:
    """Equality of LaTeX answers by `math-verify` (Kydlicek 2025), in a child process with limits.

    Numbers that are plain on both sides are compared here, exactly. A gold answer that does not parse is reported, not
    guessed.
    """

    def __init__(self) -> None:
        self._child = Child("dare.rewards.math_child")

    def compare(self, gold: str, answer: str | None) -> Equality:
        """Whether `answer` equals `gold`; too long, unreadable or too costly answers are different."""
        if number(gold) is not None and number(answer) is not None:
            return equal_numbers(gold, answer)
        self._child.send({"gold": gold, "answer": "" if answer is None or len(answer) > MAX_ANSWER else answer})
        is_gold_read = self._child.receive()
        if not is_gold_read:
            return "no_gold"
        return "equal" if self._child.receive() else "different"

    def close(self) -> None:
        """End the child; the next comparison starts another."""
        self._child.close()


def _tidy(text: str) -> str | None:
    return text.translate(_MARKUP).strip().rstrip(".").strip() or None
