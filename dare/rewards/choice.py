r"""The letter of a multiple-choice answer in a completion.

strict    the last "answer is (X)" or "Answer: X"; or the completion begins with "X.", "(X)" or is just "X"
flexible  strict; else \boxed{X}; else the last capital letter that stands alone, such as "B." or "(B)"
"""

from __future__ import annotations

import re

from dare.rewards.mathematics import MAX_TEXT, last_boxed

_STATED = re.compile(r"answer\s*(?:is|:)\s*:?\s*\**\s*\(?([A-Z])\)?(?![A-Za-z])", re.IGNORECASE)
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")
_LEADING = re.compile(r"\(([A-Z])\)(?![A-Za-z])|([A-Z])(?:[.):]+(?=\s|$)|(?=[ \t]*(?:\n|$)))")


def strict_letter(text: str, letters: str) -> str | None:
    """The letter that the completion states as its answer, one of `letters`; None if it states none of them."""
    text = text[-MAX_TEXT:].strip()
    stated = [letter.upper() for letter in _STATED.findall(text)]
    if stated:
        return stated[-1] if stated[-1] in letters else None
    leading = _LEADING.match(text)  # "A. ..." and "A" are answers, "A man ..." is a sentence
    letter = (leading[1] or leading[2]) if leading else ""
    return letter if letter and letter in letters else None


def flexible_letter(text: str, letters: str) -> str | None:
    """The strict letter, else the boxed one, else the last that stands alone; never the article "A" or the word "I"."""
    strict = strict_letter(text, letters)
    if strict is not None:
        return strict
    boxed = (last_boxed(text) or "").strip("()$. ").removeprefix("\\text{").rstrip("}")
    if boxed in letters and len(boxed) == 1:
        return boxed
    found = [match for match in _ALONE.finditer(text[-MAX_TEXT:]) if match[1] in letters]
    for match in reversed(found):
        is_word = match[1] in "AI" and re.match(r"\s+[a-z]", text[-MAX_TEXT:][match.end() :]) is not None
        if not is_word:
            return match[1]
    return None
