"""What tasks and rewards see: text in, text out. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. Exactly one of `text` and `messages` is the model's input."""

    uid: str  # stable across runs; keys the randomness of its completions
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    answer: str | None = None  # a reference completion, if the task knows one
    task: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError(f"prompt {self.uid}: give exactly one of text and messages")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated for one prompt; per-token lists cover `tokens` (through the first EOS)."""

    tokens: list[int]
    text: str | None  # None without a tokenizer; special tokens removed
    step_map: list[int]  # 0-based denoising step at which each token was committed
    logp: list[float]  # log-prob at commit, nats
    nfe: int  # denoising forwards that this sequence took part in
    finish: str  # "eos" or "length"


@dataclass(frozen=True, slots=True)
class Reward:
    """`value` trains; `is_solved` is what evaluation counts; `parts` are logged."""

    value: float
    is_solved: bool
    parts: Mapping[str, float] = field(default_factory=dict)
