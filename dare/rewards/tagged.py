"""Answers inside a pair of tags, as the planning tasks of d1 ask for them."""

from __future__ import annotations

from dare.rewards.mathematics import MAX_TEXT


def tagged_answer(text: str, tag: str = "answer") -> str | None:
    """The inside of the last <tag>...</tag>; None without a pair, or if something follows it but spaces.

    An answer before the reasoning is no answer: the pair must end the completion.
    """
    text = text[-MAX_TEXT:].rstrip()
    closing, opening = f"</{tag}>", f"<{tag}>"
    if not text.endswith(closing):
        return None
    start = text.rfind(opening, 0, len(text) - len(closing))
    return text[start + len(opening) : -len(closing)].strip() if start >= 0 else None


def last_tagged(text: str, tag: str = "answer") -> str | None:
    """The inside of the last <tag>...</tag>, wherever it is, or what follows an unclosed last <tag>."""
    text = text[-MAX_TEXT:]
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening)
    if start < 0:
        return None
    return text[start + len(opening) :].partition(closing)[0].strip() or None
