"""Rows: an example as text, as it was read, and as token ids, as it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dare.core.text import Message

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text. Prompt and completion are both plain text, or both messages.

    completion  None for prompt-only rows
    where       file and line (or row), for errors
    meta        the other columns, for a scorer
    """

    uid: str
    where: str
    prompt: str | Messages
    completion: str | Messages | None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def all_text(self) -> str:
        """Every character of the row."""
        return _text(self.prompt) + _text(self.completion or "")


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two completions of one prompt as text, the better one first."""

    uid: str
    where: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages

    def all_text(self) -> str:
        """Every character of the row."""
        return _text(self.prompt) + _text(self.chosen) + _text(self.rejected)


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document of raw text, all of which is learnt."""

    uid: str
    where: str
    text: str

    def all_text(self) -> str:
        """Every character of the row."""
        return self.text


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One example that comes as token ids; a label is the id itself or -100, where there is no loss."""

    uid: str
    where: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def all_text(self) -> str:
        """Nothing: ids have no characters."""
        return ""


AnyRow = Row | PairRow | TextRow | TokenRow


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One example as token ids; `is_scored` says which completion tokens carry loss.

    A row is one document: however rows are batched or packed, each one sees itself alone and its positions and
    blocks count from its own beginning.
    """

    uid: str
    prompt_ids: list[int]
    completion_ids: list[int]
    is_scored: list[bool]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion, EOS included."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two different completions of the same prompt; `prompt_ids` of both sides are equal.

    The sides are rows of their own, uids "UID/chosen" and "UID/rejected".
    """

    uid: str
    chosen: EncodedRow
    rejected: EncodedRow

    @property
    def num_tokens(self) -> int:
        """Of both sides."""
        return self.chosen.num_tokens + self.rejected.num_tokens


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A completion that is good or bad, without another one to compare it with."""

    row: EncodedRow
    is_good: bool


Example = EncodedRow | PreferencePair | LabelledRow  # what offline algorithms train on


def _text(part: str | Messages) -> str:
    return part if isinstance(part, str) else "".join(message["content"] for message in part)
