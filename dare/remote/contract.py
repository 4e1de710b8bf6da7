"""What is said to a rollout server and what it answers: plain data, whatever the server's own names for it are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dare.core.rng import Key, stable_id

Numbering = Literal["block", "row"]


class BadAnswer(Exception):
    """An answer that is not what was asked for; the request may be repeated."""


@dataclass(frozen=True)
class Ask:
    """One row of a rollout.

    row             its place in the rollout
    num_tokens      completion positions to fill
    key, sample_id  name its random numbers
    temperature     0 = greedy
    is_eos_ignored  go on after an EOS, to the last position
    has_logp        ask for log-probs at commit
    """

    row: int
    prompt: Sequence[int]
    num_tokens: int
    key: Key
    sample_id: int
    temperature: float
    top_k: int | None
    top_p: float | None
    is_eos_ignored: bool
    has_logp: bool = True

    @property
    def seed(self) -> int:
        """A 31-bit seed of this row alone, equal whenever the row is asked for."""
        return stable_id(self.key.state, self.sample_id) & 0x7FFFFFFF

    def name(self, attempt: int) -> str:
        """What the server should call this request; no other one, of this process or another, has the name."""
        return f"{os.getpid():x}-{self.key.state:x}-{self.sample_id:x}-{self.row}-{attempt}"

    @property
    def randomness(self) -> dict[str, str]:
        """Names the random numbers in full, for a server that draws them as DARE does; others ignore it."""
        return {"dare_key": str(self.key.state), "dare_sample_id": str(self.sample_id)}


@dataclass(frozen=True)
class Answer:
    """One row as a server returned it.

    tokens   completion ids
    steps    of each token, 1-based, numbered as the contract says; None if the server returns none
    logp     of each token when it was committed, nats; None if the server returns none
    version  label of the weights; None if the server does not say
    """

    tokens: list[int]
    steps: list[int] | None
    logp: list[float] | None
    version: str | None


@dataclass(frozen=True)
class Facts:
    """What a server says about itself; None where it does not.

    model       name or path of the model
    model_type  as in a config.json
    max_length  prompt and completion, tokens
    version     label of the weights
    """

    model: str | None = None
    model_type: str | None = None
    max_length: int | None = None
    version: str | None = None


@dataclass(frozen=True)
class Call:
    """One HTTP request; if a server need not know the path, status 404 counts as an empty answer, {}."""

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, Any] | None = None
    query: Sequence[tuple[str, str]] = field(default_factory=tuple)
    is_optional: bool = False


class Contract(Protocol):
    """A kind of server."""

    name: str
    numbering: Numbering  # steps begin again in every block, or go on through the row

    def generate(self, ask: Ask, attempt: int) -> Call:
        """The request for one row."""
        ...

    def answer(self, body: bytes, ask: Ask, attempt: int) -> Answer:
        """What came back. Raises BadAnswer if it is not an answer to this request."""
        ...

    def logp_temperature(self, temperature: float) -> float:
        """What logits are divided by in the log-probs that it returns."""
        ...

    def inquiries(self) -> list[Call]:
        """How to ask for facts."""
        ...

    def facts(self, bodies: Sequence[bytes]) -> Facts:
        """The answers to `inquiries`, in order. Raises BadAnswer."""
        ...

    def update(self, folder: Path, version: str) -> list[Call]:
        """How to make it load the weights in `folder`, step by step."""
        ...

    def check_update(self, call: Call, body: bytes) -> None:
        """Raises BadAnswer if a step of `update` did not work."""
        ...


class Message(BaseModel):
    """Base of what servers send: types are strict, fields that nobody reads are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


MessageT = TypeVar("MessageT", bound=Message)


def read(kind: type[MessageT], body: bytes) -> MessageT:
    """The parsed JSON. Raises BadAnswer saying what is wrong with it."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the body"
        raise BadAnswer(f"{place}: {problem['msg']}, got {_excerpt(body)}") from None


def check_length(num: int, ask: Ask, prompt_tokens: int, what: str = "tokens") -> None:
    """Raise BadAnswer if the prompt was not read as sent, or more came back than was asked for."""
    if prompt_tokens != len(ask.prompt):
        raise BadAnswer(f"it read {prompt_tokens} prompt tokens, {len(ask.prompt)} were sent: another row, or cut")
    if not 0 < num <= ask.num_tokens:
        raise BadAnswer(f"{num} {what}, {ask.num_tokens} were asked for")


def checked_logp(pairs: Sequence[tuple[float, int]] | None, tokens: Sequence[int]) -> list[float] | None:
    """The log-prob of each token from (log-prob, id) pairs. Raises BadAnswer if they belong to other tokens."""
    if pairs is None:
        return None
    if [token for _, token in pairs] != list(tokens):
        raise BadAnswer("the log-probs are of other tokens than those returned")
    values = [value for value, _ in pairs]
    wrong = [value for value in values if not math.isfinite(value) or value > 1e-3]
    if wrong:
        raise BadAnswer(f"{wrong[0]} is not a log-prob")
    return [min(value, 0.0) for value in values]


def _excerpt(body: bytes, length: int = 80) -> str:
    text = body[:length].decode("utf-8", errors="replace")
    return repr(text) if len(body) <= length else f"{text!r}..."
