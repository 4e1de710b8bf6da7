"""Numbers, durations and foreign text as a terminal should show them."""

from __future__ import annotations

import math
import unicodedata

_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi overrides), surrogates, line and paragraph separators


def visible(text: str, keep: str = "") -> str:
    """`text` with nothing in it that a terminal would obey: what a model writes is never trusted.

    Control characters show as symbols or escapes, except those in `keep`; without `keep` the result is one line.
    """
    return "".join(character if character in keep else _visible_character(character) for character in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters; an ellipsis stands for the rest."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def number(value: float) -> str:
    """About four significant digits."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 10_000 or (0 < size < 0.001):
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.4g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if math.isfinite(share) else str(share)


def rate(per_second: float) -> str:
    """A rate with a k or M."""
    for scale, suffix in ((1e6, "M"), (1e3, "k")):
        if per_second >= scale:
            return f"{per_second / scale:.1f}{suffix}"
    return f"{per_second:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 40ms, 1.4s, 12s, 3m05s or 2h07m."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{minutes}m{rest:02d}s" if hours == 0 else f"{hours}h{minutes_left:02d}m"


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _UNSAFE:
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character
