"""From tokens to the text that a client gets: cut at EOS, stop strings and max_tokens, and grown piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dare.families.tokenizer import decode

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character

FinishReason = Literal["stop", "length"]


class Cut(NamedTuple):
    """The tokens that count, their text, and why they end there; `is_final` if no later token can change that."""

    num_tokens: int
    text: str
    finish_reason: FinishReason
    is_final: bool


def cut(
    tokenizer: Any, tokens: Sequence[int], *, eos_ids: Sequence[int], stops: Sequence[str], max_tokens: int | None
) -> Cut:
    """What a client gets of these tokens.

    The EOS counts as a token and has no text. A stop string ends the text before it; the tokens up to the one that
    completes it count. Without a tokenizer there is no text.
    """
    limit = len(tokens) if max_tokens is None else min(max_tokens, len(tokens))
    ends = [place for place in range(limit) if tokens[place] in eos_ids]
    num_tokens = ends[0] + 1 if ends else limit
    if tokenizer is None:
        text = ""
    else:
        text = decode(tokenizer, tokens[:num_tokens])
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if found:
        num_tokens = _first_with_stop(tokenizer, tokens[:num_tokens], stops)
        return Cut(num_tokens, text[: min(found)], "stop", True)
    is_full = max_tokens is not None and num_tokens == max_tokens
    return Cut(num_tokens, text, "stop" if ends else "length", bool(ends) or is_full)


def _first_with_stop(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> int:
    """How many tokens it takes until their text holds a stop string."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        text = decode(tokenizer, tokens[:middle])
        if any(stop in text for stop in stops):
            high = middle
        else:
            low = middle + 1
    return low


class Transcript:
    """The text of one choice as it is sent: what was sent is never taken back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._sent = ""

    def grow(self, text: str, *, is_final: bool) -> str:
        """What to send next of a text that has grown; before the end, what may yet become a stop string waits."""
        if not is_final:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - self._num_open(text)]
        if not text.startswith(self._sent):
            return ""
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def _num_open(self, text: str) -> int:
        """Characters at the end with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
