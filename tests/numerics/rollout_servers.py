"""Rollout servers in threads of the test, with a layer that makes them fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import torch
import uvicorn

from dare.core.checks import check
from dare.core.decode import Decode
from dare.core.recipe import Recipe, parse_recipe
from dare.core.types import TraceBatch
from dare.executors.local import LocalEngine
from dare.executors.remote import RemoteEngine
from dare.families.base import Family
from dare.families.tokenizer import char_tokenizer
from dare.remote.host import Host
from dare.remote.server import APPS
from tests.conftest import ALPHABET

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
Change = Callable[[Any], Any]

FAST = {"timeout_s": 5.0, "backoff_s": 0.01, "retries": 2, "deadline_s": 20.0}
PROMPTS = [[3, 1, 4], [3, 1, 4], [5, 9, 2, 6, 5], [5, 9, 2, 6, 5], [1, 2, 3, 4]]
IDS = [11, 12, 13, 14, 15]
DECODE = Decode(gen_length=8, temperature=1.0, unmask="max_prob")


@dataclass
class Fault:
    """What goes wrong with requests to `path`, for the first `times` of them (None: always).

    status, headers  answer with this status
    body             answer with these bytes
    ask              what the server is asked instead, as a function of the JSON that was sent
    change           answer with this function of the JSON that would have come
    stall_s          wait so long before answering, seconds
    half             promise the whole body and send a half
    """

    path: str = "/generate"
    times: int | None = None
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes | None = None
    ask: Change | None = None
    change: Change | None = None
    stall_s: float = 0.0
    half: bool = False


class Faults:
    """Stands between a server and its clients."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()

    def count(self, path: str) -> int:
        return sum(seen == path for seen, _ in self.seen)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = b""
        while True:
            message = await receive()
            request += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["path"], json.loads(request or b"{}")))
        fault = self._next(scope["path"])
        if fault is not None and fault.stall_s:
            await anyio.sleep(fault.stall_s)
        if fault is not None and (fault.status != 200 or fault.body is not None):
            await _answer(send, fault.status, fault.body or b"made to fail", fault.headers)
            return
        if fault is not None and fault.ask is not None:
            request = json.dumps(fault.ask(json.loads(request))).encode()
        status, body = await self._inner(scope, request)
        if fault is not None and fault.change is not None:
            body = json.dumps(fault.change(json.loads(body))).encode()
        await _answer(send, status, body, [], sent=len(body) // 2 if fault is not None and fault.half else None)

    def _next(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.path == path and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    async def _inner(self, scope: Scope, request: bytes) -> tuple[int, bytes]:
        status, body = 200, b""

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": request, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        await self.app(scope, receive, send)
        return status, body


async def _answer(
    send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]], sent: int | None = None
) -> None:
    length = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*length, *headers]})
    if sent is not None:
        raise ConnectionError("half an answer")  # uvicorn drops the connection
    await send({"type": "http.response.body", "body": body})


class Running:
    """A server that answers on `url`."""

    def __init__(self, family: Family, contract: str = "sglang", *, api_key: str | None = None, port: int = 0) -> None:
        self.host = Host(family, Decode(unmask="max_prob"), "tiny")
        self.faults = Faults(APPS[contract](self.host, api_key))
        config = uvicorn.Config(self.faults, host="127.0.0.1", port=port, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()
        self.host.close()


@contextmanager
def running(family: Family, contract: str = "sglang", *, api_key: str | None = None) -> Iterator[Running]:
    """A server for the time of the block."""
    server = Running(family, contract, api_key=api_key)
    try:
        yield server
    finally:
        server.stop()


def recipe_of(folder: Path, *servers: Running, engine: str = "sglang", **changes: Any) -> Recipe:
    """A tiny online recipe, on these servers if there are any."""
    rollout = {"engine": engine, "urls": [server.url for server in servers], **FAST, **changes.pop("rollout", {})}
    data = {
        "name": "tiny",
        "model": {"path": str(folder)},
        "algorithm": "cj_grpo",
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 40, "eval_size": 8},
        "decode": DECODE.model_dump(),
        "train": {"steps": 2, "prompts_per_step": 2, "completions_per_prompt": 3},
        "evaluation": {"num": 2, "at_start": False},
        "optimizer": {"lr": 3.0e-3},
        **({"rollout": rollout} if servers else {}),
        **changes,
    }
    return parse_recipe(data, where="test")


def local_engine(folder: Path, **changes: Any) -> LocalEngine:
    return LocalEngine.create(recipe_of(folder, **changes), char_tokenizer(ALPHABET), needs_reference=False)


def remote_engine(folder: Path, *servers: Running, **changes: Any) -> RemoteEngine:
    recipe = recipe_of(folder, *servers, **changes)
    check(recipe)
    return RemoteEngine.create(recipe, char_tokenizer(ALPHABET), needs_reference=False)


def with_eos(family: Family) -> Family:
    """The family with a head that likes EOS, so that rows end in the middle of blocks."""
    with torch.no_grad():
        head_VD = family.network.head_weight
        head_VD[family.spec.eos_ids[0]] = head_VD[:20].mean(0) * 4
    return family


def assert_equal_traces(found: TraceBatch, expected: TraceBatch) -> None:
    assert torch.equal(found.canvas.input_BS, expected.canvas.input_BS)
    assert torch.equal(found.canvas.is_real_BS, expected.canvas.is_real_BS)
    assert torch.equal(found.canvas.is_completion_BS, expected.canvas.is_completion_BS)
    assert torch.equal(found.canvas.block_BS, expected.canvas.block_BS)
    assert torch.equal(found.step_map_BS, expected.step_map_BS)
    assert torch.equal(found.nfe_B, expected.nfe_B)
    assert torch.equal(found.is_eos_B, expected.is_eos_B)
    if "logp" not in found.missing:
        assert torch.allclose(found.logp_BS, expected.logp_BS, atol=1e-5)


def in_meta(**changes: Any) -> Change:
    """A change of what a server says about a row: new values, or functions of what they were."""

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        meta = dict(answer["meta_info"])
        meta |= {name: new(meta[name]) if callable(new) else new for name, new in changes.items()}
        return {**answer, "meta_info": meta}

    return change
