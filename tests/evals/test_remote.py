"""Servers that are not there, or are not ours: said plainly, without a hang and without a result."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dare import api
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.text import Prompt
from dare.evals.backend import Stream, continuations, likelihood_stream
from dare.evals.likelihood import Likelihood
from dare.evals.remote import HttpBackend

CARDS = {"data": [{"id": "tiny"}]}


@contextmanager
def server(answers: dict[str, list[tuple[int, Any]]]) -> Iterator[tuple[str, list[Any]]]:
    """A server that gives the answers of a path one after the other; its URL, and the bodies that it got."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._reply()

        def _reply(self) -> None:
            waiting = answers.get(self.path, [(404, "nothing here")])
            status, answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return

    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}", bodies
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def choice(index: int, text: str) -> dict[str, Any]:
    details = {"token_ids": [1], "step_map": [0], "logp": [-0.5], "nfe": 1, "finish": "length"}
    return {"index": index, "text": text, "finish_reason": "length", "dare": details}


def test_a_server_that_is_not_there_and_other_addresses() -> None:
    with pytest.raises(DareError, match="does not answer") as caught:
        HttpBackend("http://127.0.0.1:9")
    assert "dare serve" in str(caught.value)
    for url in ("ftp://here", "http://", "http://127.0.0.1:9/other"):
        with pytest.raises(DareError, match="no address"):
            HttpBackend(url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, "<html>"), "something else than `dare serve`"),
        ((200, {"models": []}), "something else than `dare serve`"),
        ((200, {"data": []}), "no model"),
        ((401, {"error": {"message": "no key", "param": None}}), "401: no key"),
        ((500, "broken"), "500: broken"),
    ],
)
def test_other_servers(answer: tuple[int, Any], message: str) -> None:
    with server({"/v1/models": [answer]}) as (url, _), pytest.raises(DareError) as caught:
        HttpBackend(url)
    assert message in str(caught.value)


def test_requests_name_their_random_numbers_and_wait_for_a_busy_server() -> None:
    busy = (429, {"error": {"message": "later", "param": None}})
    answers = {
        "/v1/models": [(200, CARDS)],
        "/v1/completions": [busy, busy, (200, {"choices": [choice(1, "b"), choice(0, "a")]})],
        "/v1/loglikelihood": [
            (200, {"data": [{"index": 1, "log_likelihood": -2}, {"index": 0, "log_likelihood": -1}]})
        ],
    }
    with server(answers) as (url, bodies):
        backend = HttpBackend(url)
        decode = Decode(gen_length=8, block_length=4)
        prompts = [Prompt("1", text="x"), Prompt("2", text="y")]
        found = backend.generate(prompts, decode, Stream(3, ("evaluation", "gsm8k")), [5, 6])
        assert [completion.text for completion in found] == ["a", "b"]
        assert len(bodies) == 3
        assert bodies[-1]["prompt"] == ["x", "y"]
        assert bodies[-1]["seed"] == 3
        assert {name: bodies[-1]["dare"][name] for name in ("key", "sample_ids", "details")} == {
            "key": ["evaluation", "gsm8k"], "sample_ids": [5, 6], "details": True,
        }  # fmt: skip
        assert Decode.model_validate(bodies[-1]["dare"]["decode"]) == decode
        items = continuations([("q", " a"), ("q", " b")])
        assert backend.log_likelihoods(items, Likelihood(num_samples=2), likelihood_stream(4)) == [-1.0, -2.0]
        assert bodies[-1]["likelihood"] == {"num_samples": 2, "cfg_scale": 0.0}
        assert [item["sample_id"] for item in bodies[-1]["items"]] == [items[0].sample_id] * 2
        assert bodies[-1]["key"] == ["likelihood"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"choices": [choice(0, "a")]}), "too few or too many"),
        ((200, {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}), "something else"),
        ((400, {"error": {"message": "at most 4", "param": "max_tokens"}}), "at most 4 (max_tokens)"),
    ],
)
def test_an_evaluation_of_a_bad_server_has_no_result(
    answer: tuple[int, Any], message: str, data: Path, tmp_path: Path
) -> None:
    options = {"task.style": "text", "task.limit": 2, "gen_length": 8}
    with server({"/v1/models": [(200, CARDS)], "/v1/completions": [answer]}) as (url, _):
        with pytest.raises(DareError) as caught:
            api.evaluate_benchmarks(url, ["gsm8k"], out=tmp_path, overrides=options)
        assert message in str(caught.value)
        assert not (tmp_path / "gsm8k" / "manifest.json").exists()
        with pytest.raises(DareError, match="does not say whether its model chats"):
            api.evaluate_benchmarks(url, ["gsm8k"], out=tmp_path)
        with pytest.raises(DareError, match="no preset fits"):
            api.evaluate_benchmarks(url, ["gsm8k"], out=tmp_path, preset="table")
