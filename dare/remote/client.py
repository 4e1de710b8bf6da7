"""HTTP to one rollout server: every request has a limit, every failure is repeated a bounded number of times."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import httpx2

from dare.core.errors import DareError
from dare.core.rollout_recipe import RolloutRecipe, is_loopback
from dare.remote.contract import BadAnswer, Call

ResultT = TypeVar("ResultT")
_MAX_BODY = 256 * 2**20  # bytes; a row with log-probs takes some tens of kB
_MAX_PAUSE_S = 30.0
_CONNECT_S = 10.0
_EXCERPT = 300


class Unavailable(Exception):
    """A server did not do what it was asked for, in all attempts that the recipe allows.

    is_late  the whole rollout ran out of time, so that asking another server is of no use
    """

    def __init__(self, url: str, doing: str, reason: str, *, is_late: bool = False) -> None:
        self.url, self.doing, self.reason, self.is_late = url, doing, reason, is_late
        super().__init__(f"{url}, {doing}: {reason}")


class Deadline:
    """A point in time on a clock that nobody sets back."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, 0 at the end."""
        return max(self._end - time.monotonic(), 0.0)


class Client:
    """One server. Threads may share it."""

    def __init__(self, url: str, options: RolloutRecipe, api_key: str | None) -> None:
        self.url, self.options = url, options
        self._closed = threading.Event()
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(options.timeout_s, connect=min(options.timeout_s, _CONNECT_S)),
            limits=httpx2.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency),
            trust_env=not is_loopback(url),  # a proxy of the environment does not lead to this machine itself
            follow_redirects=False,
        )

    def ask(
        self,
        make: Callable[[int], Call],
        read: Callable[[bytes, int], ResultT],
        *,
        doing: str,
        deadline: Deadline,
        recover: Callable[[], None] | None = None,
    ) -> ResultT:
        """What `read` makes of the answer to `make`, both given the number of the attempt.

        recover  called before another attempt
        Raises Unavailable if no attempt succeeds (no connection, too slow, half an answer, status 429 or 5xx, an answer
        that `read` refuses with BadAnswer), DareError for what another attempt cannot change: a status 3xx or 4xx.
        """
        reason = "no time was left for it"
        for attempt in range(self.options.retries + 1):
            pause = None
            try:
                if attempt and recover is not None:
                    recover()
                status, body, pause = self._send(make(attempt), deadline, doing)
                if status < 300:
                    return read(body, attempt)
                reason = f"status {status}: {_message(body)}"
            except BadAnswer as error:
                reason = str(error)
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.options.retries:
                self._wait(attempt, pause, deadline, doing, reason)
        raise Unavailable(self.url, doing, f"{reason} ({self.options.retries + 1} attempts)")

    def close(self) -> None:
        """End all connections and pauses, also those of other threads."""
        self._closed.set()
        self._http.close()

    def _send(self, call: Call, deadline: Deadline, doing: str) -> tuple[int, bytes, float | None]:
        """Status, body, and the pause that the server asks for, seconds. A slow trickle runs out of time too."""
        limit = Deadline(min(self.options.timeout_s, deadline.left()))
        body = bytearray()
        if limit.left() == 0.0:
            raise Unavailable(self.url, doing, f"the rollout took its {deadline.seconds:g} s", is_late=True)
        content = None if call.body is None else json.dumps(call.body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        with self._http.stream(
            call.method,
            self.url + call.path,
            content=content,
            params=list(call.query) or None,
            headers=headers,
            timeout=httpx2.Timeout(limit.left(), connect=min(limit.left(), _CONNECT_S)),
        ) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _MAX_BODY:
                    raise BadAnswer(f"it sends more than {_MAX_BODY} bytes")
                if limit.left() == 0.0:
                    raise httpx2.ReadTimeout(f"no whole answer within {limit.seconds:g} s")
            if response.status_code == 404 and call.is_optional:
                return 200, b"{}", None
            if response.status_code >= 300:
                self._stop_if_final(response.status_code, bytes(body), doing)
            return response.status_code, bytes(body), _retry_after(response)

    def _stop_if_final(self, status: int, body: bytes, doing: str) -> None:
        if status in (401, 403):
            name = self.options.api_key_env
            refuse(
                "the rollout server refuses the API key",
                self.url,
                doing,
                f"status {status}",
                "set api_key_env" if name is None else f"put the server's key into the variable {name}",
            )
        if status < 500 and status not in (408, 425, 429):
            fix = "see its log; is rollout.engine what it is, and was it started with these options?"
            refuse("the rollout server refuses a request", self.url, doing, f"status {status}: {_message(body)}", fix)

    def _wait(self, attempt: int, pause: float | None, deadline: Deadline, doing: str, reason: str) -> None:
        usual = min(self.options.backoff_s * 2.0**attempt, _MAX_PAUSE_S)
        seconds = usual if pause is None else max(pause, usual)
        if seconds >= deadline.left():
            late = f"{reason}; the rollout took its {deadline.seconds:g} s"
            raise Unavailable(self.url, doing, late, is_late=True)
        if self._closed.wait(seconds):
            raise Unavailable(self.url, doing, f"{reason}; nobody waits for it any more", is_late=True)


def refuse(what: str, url: str, doing: str, got: str, fix: str) -> NoReturn:
    """Raise the DareError for a server that will not do it, however often it is asked."""
    raise DareError(what, where=f"{url}, {doing}", got=got, fix=fix)


def read_api_key(options: RolloutRecipe) -> str | None:
    """The key in the variable that the recipe names. Raises DareError if there is none."""
    if options.api_key_env is None:
        return None
    key = os.environ.get(options.api_key_env, "")
    if not key:
        raise DareError(
            "the API key of the rollout servers is not set",
            where="rollout.api_key_env",
            got=f"no variable {options.api_key_env}",
            fix=f"export {options.api_key_env}=KEY",
        )
    return key


def _retry_after(response: httpx2.Response) -> float | None:
    try:
        return max(float(response.headers.get("Retry-After", "")), 0.0)
    except ValueError:  # absent, or a date
        return None


def _message(body: bytes) -> str:
    text = body[:_EXCERPT].decode("utf-8", errors="replace").strip()
    return text or "no message"
