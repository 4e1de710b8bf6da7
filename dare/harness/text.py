"""Text of completions as harnesses want it."""

from __future__ import annotations

from collections.abc import Sequence


def cut_at(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [place for stop in ([stops] if isinstance(stops, str) else stops) if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]
