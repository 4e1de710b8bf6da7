"""What is refused, and that the refusal names the field; clients that leave, stall or come too often."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dare.core.errors import DareError
from dare.model import Model
from dare.serve.guard import Guard, Message
from dare.serve.keys import read_keys
from dare.serve.limits import Limits, read_limits
from dare.serve.metrics import Metrics
from dare.serve.server import check_host, open_socket
from tests.serve.conftest import HOST, LIMITS, Served, running

# Long enough that a test can act while it runs: a step of one row takes about a millisecond.
LONG = {"prompt": "ab", "n": 8, "max_tokens": 32, "dare": {"details": True, "decode": {"eos_stop": False}}}
KEY = "0123456789abcdefXYZ"

WRONG: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokns": 3}, 400, "max_tokns"),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": "a", "temperature": -0.1}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "temperature": "1"}, 400, "temperature"),
    ("/v1/completions", {"prompt": "a", "seed": -1}, 400, "seed"),
    ("/v1/completions", {"prompt": "a", "n": 9}, 400, "n"),
    ("/v1/completions", {"prompt": ["a"] * 9}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a" * 61}, 400, "prompt"),
    ("/v1/completions", {"prompt": "\u00e9"}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, -1]}, 400, "prompt.1"),
    ("/v1/completions", {"prompt": [1, 100000]}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 33}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, 400, "stop"),
    ("/v1/completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs"),
    ("/v1/completions", {"prompt": "a", "presence_penalty": 1.0}, 400, "presence_penalty"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"unmsk": "x"}}}, 400, "dare.decode.unmsk"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"unmask": "best"}}}, 400, "dare.decode.unmask"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"gen_length": 10**9}}}, 400, "dare.decode.gen_length"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"block_length": 999}}}, 400, "dare.decode.block_length"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"top_k": 10**30}}}, 400, "dare.decode.top_k"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"cache": "dual", "cfg_scale": 1.0}}}, 400, "dare.decode"),
    ("/v1/completions", {"prompt": "a", "temperature": 1.0, "dare": {"decode": {"temperature": 0.5}}}, 400,
     "temperature"),
    ("/v1/completions", {"prompt": "a", "dare": {"decode": {"schedule": "timesteps", "steps_per_block": 9999}}}, 400,
     "dare.decode.steps_per_block"),
    ("/v1/completions", {"prompt": "a", "dare": {"sample_ids": [1, 2]}}, 400, "dare.sample_ids"),
    ("/v1/completions", {"prompt": "a", "dare": {"canvas": True}}, 400, "dare.canvas"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": []}, 400, "tools"),
    ("/v1/loglikelihood", {"items": []}, 400, "items"),
    ("/v1/loglikelihood", {"items": [{"context": "a", "continuation": ""}]}, 400, "items.0"),
    ("/v1/loglikelihood", {"items": [{"context": "a", "continuation": "b"}] * 5}, 400, "items"),
    ("/v1/loglikelihood", {"items": [{"context": [1], "continuation": [1] * 60}]}, 400, "items.0"),
    ("/v1/loglikelihood", {"items": [{"context": "a", "continuation": "b"}], "likelihood": {"num_samples": 10**5}},
     400, "likelihood.num_samples"),
]  # fmt: skip
BODIES: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 4000, 400),
    (b'"' + b"a" * 4094 + b'"', 400),
    (b" " * 4097, 413),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b'{"prompt": "a", "\\ud800": 1}', 400),
    (b'{"prompt": "a", "dare": {"decode": {"top_p": Infinity}}}', 400),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), WRONG)
def test_a_refusal_names_the_field(path: str, body: Any, status: int, param: str | None, served: Any) -> None:
    answer = served["llada"].ask(path, body)
    assert answer.status == status, answer.text
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["message"]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_request(body: bytes, status: int, served: dict[str, Served]) -> None:
    answer = served["llada"].ask("/v1/completions", body)
    assert answer.status == status, answer.text
    assert answer.error["message"]


def test_wrong_paths_methods_and_hosts(served: dict[str, Served]) -> None:
    server = served["llada"]
    assert server.ask("/v2/models").status == 404
    assert server.ask("/v1/models", {}).status == 405
    for name in ("evil.example", "evil.example:8000"):
        assert server.ask("/v1/models", headers={"Host": name}).error["code"] == "wrong_host"
    assert server.ask("/v1/models", headers={"Host": f"localhost:{server.port}"}).status == 200


def test_addresses_that_others_reach_need_a_key(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(DareError, match="API key is required"):
            check_host(host, [])
        check_host(host, [KEY])
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_host(host, [])
    file = tmp_path / "keys"
    for content in ("", "\n \n", "short\n"):
        file.write_text(content)
        with pytest.raises(DareError):
            read_keys(file, None)
    file.write_text(f"{KEY}\n\n{KEY}2\n")
    monkeypatch.setenv("SERVE_KEY", KEY + "3")
    assert read_keys(file, "SERVE_KEY") == [KEY, KEY + "2", KEY + "3"]
    for missing in ((tmp_path / "nothing", None), (None, "NOT_SET_ANYWHERE")):
        with pytest.raises(DareError):
            read_keys(*missing)


def test_wrong_limits_and_taken_ports() -> None:
    with pytest.raises(DareError, match="max_tokens"):
        read_limits({"max_token": 3})
    with pytest.raises(DareError, match="timeout_s"):
        read_limits({"timeout_s": 0})
    with open_socket(HOST, 0) as taken, pytest.raises(DareError, match="cannot serve here"):
        open_socket(HOST, taken.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def send(port: int, body: Any) -> socket.socket:
    """A request whose answer nobody has read yet."""
    connection = socket.create_connection((HOST, port), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_of_a_client_that_leaves_are_given_up(is_stream: bool, served: dict[str, Served]) -> None:
    server = served["sdar"]
    counter = server.service.metrics.given_up
    before = counter._value.get()
    connection = send(server.port, {**LONG, "stream": is_stream})
    wait_for(lambda: not server.service.scheduler.is_idle)
    connection.close()
    wait_for(lambda: server.service.scheduler.is_idle)
    assert counter._value.get() > before
    assert server.complete(prompt="ab")["choices"]


def test_queue_time_and_slow_requests_are_limited(models: dict[str, Model]) -> None:
    tight = LIMITS.model_copy(update={"max_queue": 9, "timeout_s": 0.001, "read_timeout_s": 0.3})
    with running(models["sdar"], limits=tight, num_seats=1) as server:
        assert server.ask("/v1/completions", LONG).error["code"] == "timeout"
        streamed = server.ask("/v1/completions", {**LONG, "stream": True}).text
        assert json.loads(streamed.removeprefix("data: "))["error"]["code"] == "timeout"
        with socket.create_connection((HOST, server.port), timeout=10) as half_open:
            assert half_open.recv(100) == b""  # no request comes
        with socket.create_connection((HOST, server.port), timeout=10) as dripping:
            dripping.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            assert dripping.recv(100) == b""  # its head never ends
        with socket.create_connection((HOST, server.port), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{")
            assert b"408" in slow.recv(100)  # its body never ends
    with running(models["sdar"], limits=tight.model_copy(update={"timeout_s": 30.0}), num_seats=1) as server:
        waiting = [send(server.port, LONG) for _ in range(3)]
        wait_for(lambda: server.ask("/v1/completions", LONG).status == 429)
        refused = server.ask("/v1/completions", LONG)
        assert refused.status in (200, 429)
        for connection in waiting:
            connection.close()
    with running(models["sdar"], limits=LIMITS.model_copy(update={"max_requests": 1})) as server:
        with socket.create_connection((HOST, server.port), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{")
            wait_for(lambda: server.ask("/v1/models").status == 429)
            assert server.ask("/health").status == 200
        wait_for(lambda: server.ask("/v1/models").status == 200)


def test_keys(models: dict[str, Model], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dare.serve")
    with running(models["llada"], keys=[KEY, KEY + "2"]) as server:
        for header in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer "}):
            answer = server.ask("/v1/completions", {"prompt": "a"}, header)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert server.ask("/metrics", headers=header).status == 401
        for key in (KEY, KEY + "2"):
            assert server.ask("/v1/completions", {"prompt": "a"}, {"Authorization": f"Bearer {key}"}).status == 200
        assert server.ask("/health", headers={"Host": "anything"}).status == 200
    assert len(caplog.records) >= 11
    assert KEY not in caplog.text
    assert '"a"' not in caplog.text


def test_a_stalled_client_is_dropped() -> None:
    aborted = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nobody_reads(message: Message) -> None:
        await asyncio.sleep(60)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    limits = Limits(write_timeout_s=0.01)
    guard = Guard(app, limits, Metrics(), hosts=None)
    scope = {"type": "http", "path": "/", "headers": [], "state": {"abort": lambda: aborted.append(True)}}
    asyncio.run(guard(scope, receive, nobody_reads))
    assert aborted == [True]


def test_draining_finishes_what_runs_and_refuses_what_comes(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the engine is done long before an answer is text."""
    with running(models["sdar"]) as server:
        text = server.service.text

        async def slow_text(work: Callable[[], Any]) -> Any:
            await asyncio.sleep(0.1)
            return await text(work)

        monkeypatch.setattr(server.service, "text", slow_text)
        results: list[Any] = []
        client = threading.Thread(target=lambda: results.append(server.ask("/v1/completions", LONG)))
        client.start()
        wait_for(lambda: not server.service.scheduler.is_idle)
        server.service.scheduler.drain()
        assert server.ask("/health").json["status"] == "draining"
        refused = server.ask("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        server.stop()
        client.join()
        assert results[0].status == 200
        assert len(results[0].json["choices"]) == 8
        with pytest.raises(ConnectionError):
            server.ask("/health")


def test_time_to_drain_is_limited(models: dict[str, Model]) -> None:
    with running(models["sdar"], limits=LIMITS.model_copy(update={"drain_s": 0.0}), num_seats=1) as server:
        results: list[Any] = []
        client = threading.Thread(target=lambda: results.append(server.ask("/v1/completions", LONG)))
        client.start()
        wait_for(lambda: not server.service.scheduler.is_idle)
        server.stop()
        client.join()
        assert results[0].error["code"] == "stopped"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_is_answered_and_ends_the_server(models: dict[str, Model]) -> None:
    with running(models["sdar"]) as server:

        def fail(*_: Any) -> None:
            raise LookupError("a fault that nobody foresaw")

        server.service.scheduler._finish = fail  # type: ignore[method-assign]
        answer = server.ask("/v1/completions", {"prompt": "ab"})
        assert (answer.status, answer.error["code"]) == (500, "engine_failed")
        server.stop()
        assert isinstance(server.service.scheduler.fault, LookupError)
