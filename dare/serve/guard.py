"""What stands before the application: who may ask, how much, and how slowly. Plain ASGI.

The log names requests by id, path, sizes and time: nothing that a client sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from dare.serve.errors import CLIENT_LEFT, ApiError
from dare.serve.limits import Limits
from dare.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health",)  # for those who only ask whether the server is alive
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/loglikelihood", "/v1/models", "/health", "/metrics")

log = logging.getLogger("dare.serve")


class Guard:
    """Checks host and key, reads the body within its limits, and counts and logs the answer.

    keys   API keys, any of which is good; none: whoever reaches the server may ask
    hosts  values of the Host header that are answered; None: all. Without keys this keeps pages in a browser, which
           can name this machine as they like, away from a server on loopback
    """

    def __init__(
        self, app: App, limits: Limits, metrics: Metrics, *, keys: Iterable[str] = (), hosts: Iterable[str] | None
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._digests = [_digest(key) for key in keys]
        self._hosts = None if hosts is None else frozenset(hosts)
        self._num_active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = _Sent(scope, send, self._limits.write_timeout_s)
        size = 0
        self._num_active += 1
        try:
            self._check_host(scope)
            self._check_key(scope)
            if self._num_active > self._limits.max_requests and scope["path"] not in OPEN_PATHS:
                raise ApiError(429, "too many requests at once; try again later", code="too_many_requests")
            body = await self._read(scope, receive)
            size = len(body)
            await self._app(scope, _replay(body, receive), sent.send)
        except ApiError as error:
            await error.response()(scope, receive, sent.send)
        except _Stalled:
            sent.abort()
        finally:
            self._num_active -= 1
            self._record(scope, sent, size)

    def _check_host(self, scope: Scope) -> None:
        host = _header(scope, b"host").rpartition(":")[0] or _header(scope, b"host")
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, "this server answers under the name of its own machine only", code="wrong_host")

    def _check_key(self, scope: Scope) -> None:
        if not self._digests or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        given = _digest(key.strip())
        # All keys are compared, each in constant time.
        is_known = sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0
        if scheme.lower() != "bearer" or not is_known:
            error = ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )
            error.headers = {"WWW-Authenticate": "Bearer"}
            raise error

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError: 413 if it is too large, 408 if it does not come."""
        limit = self._limits.max_body_bytes
        length = _header(scope, b"content-length")
        too_large = ApiError(413, f"the request is larger than {limit} bytes", code="body_too_large")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body, has_more = bytearray(), True
        try:
            async with asyncio.timeout(self._limits.read_timeout_s):
                while has_more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left", code=CLIENT_LEFT)
                    body += message.get("body", b"")
                    has_more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="read_timeout") from None
        return bytes(body)

    def _record(self, scope: Scope, sent: _Sent, size: int) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"
        seconds = time.monotonic() - sent.since
        self._metrics.requests.labels(path, str(sent.status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        log.info("%s %s %s in %d out %d %.3fs", sent.id, path, sent.status, size, sent.num_bytes, seconds)


class _Stalled(Exception):
    """A client that takes nothing of its answer."""


class _Sent:
    """What has been sent of an answer; `send` gives up on clients that do not read."""

    def __init__(self, scope: Scope, send: Send, timeout_s: float) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.status, self.num_bytes, self.since = 0, 0, time.monotonic()
        self._send, self._timeout_s = send, timeout_s
        self._abort: Callable[[], None] | None = scope.get("state", {}).get("abort")

    async def send(self, message: Message) -> None:
        """Raises _Stalled if the client does not take the message in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.id.encode())]
        self.num_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            raise _Stalled from None

    def abort(self) -> None:
        """Drop the connection, with what the client has not taken."""
        if self._abort is not None:
            self._abort()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _header(scope: Scope, name: bytes) -> str:
    """The value of a request header; empty if it is not there."""
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found.decode("latin-1")
