"""Real servers around tiny real models, on loopback, and a client of the standard library."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dare.families.tokenizer import char_tokenizer
from dare.model import Model, load
from dare.serve.limits import Limits
from dare.serve.server import guarded_app, open_socket, serve
from dare.serve.service import Service
from tests.conftest import save_checkpoint
from tests.evals.conftest import ASCII, TEMPLATE

HOST = "127.0.0.1"
LIMITS = Limits(max_prompt_tokens=60, max_tokens=32, max_choices=8, max_items=4, max_body_bytes=4096, timeout_s=30)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


class Served(NamedTuple):
    """A running server."""

    service: Service
    port: int
    stop: Callable[[], None]

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """POST with a body, GET without."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, content, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, text)

    def complete(self, **body: Any) -> Any:
        answer = self.ask("/v1/completions", body)
        assert answer.status == 200, answer.text
        return answer.json

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ended as it should."""
        events = self.ask(path, {**body, "stream": True}).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@contextmanager
def running(model: Model, *, limits: Limits = LIMITS, keys: Sequence[str] = (), num_seats: int = 4) -> Iterator[Served]:
    """A server in a thread, drained at the end."""
    defaults = {"gen_length": 8, "block_length": 4}
    service = Service(model, name="tiny", limits=limits, num_seats=num_seats, defaults=defaults)
    opened = open_socket(HOST, 0)
    port = opened.getsockname()[1]
    ready, loops = threading.Event(), []
    stop = asyncio.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await serve(service, opened, guarded_app(service, HOST, keys), ready.set, stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)

    def end() -> None:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()

    try:
        yield Served(service, port, end)
    finally:
        end()


Serve = Callable[..., AbstractContextManager[Served]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Random models of both kinds that read ASCII and chat."""
    found = {}
    for name in ("llada", "sdar"):
        tokenizer = char_tokenizer(ASCII)
        tokenizer.chat_template = TEMPLATE
        path: Path = tmp_path_factory.mktemp("serve") / name
        found[name] = load(save_checkpoint(path, name, tokenizer, seed=1, max_length=128))
    return found


@pytest.fixture(scope="session")
def served(models: dict[str, Model]) -> Iterator[dict[str, Served]]:
    """One server for each model, for all tests that do not stop it."""
    with running(models["llada"]) as llada, running(models["sdar"]) as sdar:
        yield {"llada": llada, "sdar": sdar}
