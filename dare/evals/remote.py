"""Evaluate a model behind `dare serve`: the same requests, over HTTP, with the same random numbers."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.text import Completion, Prompt
from dare.evals.backend import Continuation, Stream
from dare.evals.benchmarks.base import Style
from dare.evals.likelihood import Likelihood

KEY_VARIABLE = "DARE_API_KEY"
_PER_REQUEST = 16  # prompts or continuations; several requests are under way at a time, which the server batches
_NUM_REQUESTS = 8
_NUM_TRIES = 60  # of a request that the server has no room for
_TIMEOUT_S = 3600.0  # of a silent server: it answers when the whole request is done
_BUSY = (429, 503)
_AnswerT = TypeVar("_AnswerT", bound=BaseModel)


class _Details(BaseModel):
    token_ids: list[int]
    step_map: list[int]
    logp: list[float]
    nfe: int
    finish: str


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    index: int
    text: str | None = None
    message: _Message | None = None
    dare: _Details


class _Completions(BaseModel):
    choices: list[_Choice]


class _Value(BaseModel):
    index: int
    log_likelihood: float


class _Values(BaseModel):
    data: list[_Value]


class _Card(BaseModel):
    id: str


class _Cards(BaseModel):
    data: list[_Card]


class HttpBackend:
    """A back end for evaluations that asks a server. The API key is the environment variable DARE_API_KEY.

    Raises DareError if there is no server, if it is not one of ours, and for everything that it refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/v1"):
            raise DareError("this is no address of a server", got=url, expected="http://HOST:PORT")
        self._is_safe, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        cards = self._ask("/v1/models", None, _Cards).data
        if len(cards) != 1:
            raise DareError("the server has no model, or more than one", where=self.url, got=len(cards))
        self.model = cards[0].id

    def generate(
        self, prompts: Sequence[Prompt], decode: Decode, stream: Stream, sample_ids: list[int]
    ) -> list[Completion]:
        """Completions in order, as the native back end gives them for the same stream and ids."""
        # Options that are not set are sent too: the server's own defaults would take their place.
        options = decode.model_dump(mode="json", exclude={"batch_size"})
        bodies: list[tuple[str, dict[str, Any]]] = []
        for indices in _groups([prompt.text is None for prompt in prompts]):
            part = [prompts[index] for index in indices]
            words: dict[str, Any] = {"messages": list(part[0].messages or ())}
            if part[0].text is not None:
                words = {"prompt": [prompt.text for prompt in part]}
            own = {"decode": options, "details": True, "key": list(stream.path)}
            body = {**words, "seed": stream.seed, "dare": {**own, "sample_ids": [sample_ids[i] for i in indices]}}
            bodies.append(("/v1/completions" if part[0].text is not None else "/v1/chat/completions", body))
        answers = self._all(lambda body: self._ask(body[0], body[1], _Completions).choices, bodies)
        found = [choice for choices in answers for choice in sorted(choices, key=lambda choice: choice.index)]
        self._check_number(found, len(prompts))
        return [_completion(choice) for choice in found]

    def log_likelihoods(self, items: Sequence[Continuation], options: Likelihood, stream: Stream) -> list[float]:
        """Log-likelihoods in nats, in order."""
        settings = options.model_dump(mode="json", exclude={"batch_size"})
        rows = [
            {
                "context": item.prompt.text if item.prompt.text is not None else list(item.prompt.messages or ()),
                "continuation": item.text,
                "sample_id": item.sample_id,
            }
            for item in items
        ]
        bodies = [
            {
                "items": rows[start : start + _PER_REQUEST],
                "likelihood": settings,
                "seed": stream.seed,
                "key": list(stream.path),
            }
            for start in range(0, len(rows), _PER_REQUEST)
        ]
        answers = self._all(lambda body: self._ask("/v1/loglikelihood", body, _Values).data, bodies)
        found = [value for values in answers for value in sorted(values, key=lambda value: value.index)]
        self._check_number(found, len(items))
        return [value.log_likelihood for value in found]

    def default_style(self) -> Style:
        """Always raises DareError: a server does not say whether its model has a chat template."""
        raise DareError(
            "a server does not say whether its model chats",
            where=self.url,
            fix="give task.style=chat, or task.style=text for a model without a chat template",
        )

    def describe(self) -> dict[str, Any]:
        """The server's address and its name for the model."""
        return {"family": None, "checkpoint": self.url, "served_model": self.model}

    def _all(self, ask: Callable[[Any], Any], bodies: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            return list(pool.map(ask, bodies))

    def _ask(self, path: str, body: dict[str, Any] | None, kind: type[_AnswerT]) -> _AnswerT:
        """The server's answer, of the expected kind; waits where the server is busy."""
        status, text, wait = self._send(path, body)
        for _ in range(_NUM_TRIES):
            if status not in _BUSY:
                break
            time.sleep(wait)
            status, text, wait = self._send(path, body)
        where = self.url + path
        if status != 200:
            raise DareError("the server refuses", where=where, got=f"{status}: {_reason(text)}")
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise DareError(
                "the server answers something else than `dare serve`",
                where=where,
                got=text[:200],
                expected=f"{error.error_count()} fields that are not there or are of another kind",
            ) from None

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, str, float]:
        """Status, text, and how many seconds the server wants us to wait if it is busy."""
        kind = http.client.HTTPSConnection if self._is_safe else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            connection.request(
                "GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers
            )
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
            wait = answer.getheader("Retry-After", "1")
            return answer.status, text, float(wait) if wait.isdigit() else 1.0
        except (OSError, http.client.HTTPException) as error:
            raise DareError(
                "the server does not answer",
                where=self.url + path,
                got=f"{type(error).__name__}: {error}",
                fix="start one: dare serve CHECKPOINT",
            ) from None
        finally:
            connection.close()

    def _check_number(self, found: Sequence[object], num: int) -> None:
        if len(found) != num:
            raise DareError(
                "the server gives too few or too many answers", where=self.url, got=len(found), expected=num
            )


def is_url(checkpoint: str) -> bool:
    """Whether a checkpoint is the address of a server."""
    return checkpoint.startswith(("http://", "https://"))


def _groups(is_chat: Sequence[bool]) -> list[list[int]]:
    """Indices of prompts that go into one request, in order: a conversation alone, texts up to a number."""
    groups: list[list[int]] = []
    for index, is_alone in enumerate(is_chat):
        if not groups or is_alone or is_chat[groups[-1][0]] or len(groups[-1]) == _PER_REQUEST:
            groups.append([])
        groups[-1].append(index)
    return groups


def _completion(choice: _Choice) -> Completion:
    text = choice.text if choice.message is None else choice.message.content
    details = choice.dare
    return Completion(details.token_ids, text, details.step_map, details.logp, details.nfe, details.finish)


def _reason(text: str) -> str:
    """The message of an error object, and the field that it names; else the beginning of the answer."""
    try:
        error = json.loads(text)["error"]
        return f"{error['message']} ({error['param']})" if error.get("param") else str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:200]
