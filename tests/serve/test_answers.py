"""What the server answers is what `dare.generate` and the evaluation compute, whoever else asks at the same time."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dare.core.decode import Decode
from dare.core.text import Completion, Prompt
from dare.evals.backend import Continuation, NativeBackend, Stream
from dare.evals.likelihood import Likelihood
from dare.families.tokenizer import decode
from dare.model import Model
from tests.serve.conftest import Served

FAMILIES = ["llada", "sdar"]
DECODE = {"gen_length": 8, "block_length": 4}


def choices_of(completions: list[Completion]) -> list[dict[str, Any]]:
    return [
        {"text": item.text, "tokens": item.tokens, "step_map": item.step_map, "nfe": item.nfe, "finish": item.finish}
        for item in completions
    ]


def shown(answer: Any) -> list[dict[str, Any]]:
    found = []
    for choice in answer["choices"]:
        details = choice["dare"]
        kept = {key: details[key] for key in ("step_map", "nfe", "finish")}
        found.append({"text": choice["text"], "tokens": details["token_ids"], **kept})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_generate(family: str, served: dict[str, Served], models: dict[str, Model]) -> None:
    model = models[family]
    prompts = ["ab", "x", "ab"]
    expected = model.generate([p for p in prompts for _ in range(2)], seed=5, temperature=1.0, **DECODE)
    answer = served[family].complete(prompt=prompts, n=2, seed=5, temperature=1.0, dare={"details": True})
    assert shown(answer) == choices_of(expected)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    num_tokens = sum(len(item.tokens) for item in expected)
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": num_tokens,
        "total_tokens": 5 + num_tokens,
    }
    for choice, item in zip(answer["choices"], expected, strict=True):
        assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[item.finish]
        assert choice["dare"]["logp"] == pytest.approx(item.logp, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_chat_and_decode_options(family: str, served: dict[str, Served], models: dict[str, Model]) -> None:
    model, server = models[family], served[family]
    options = {"gen_length": 16, "unmask": "threshold", "threshold": 0.1, "temperature": 0.5}
    (ids_expected,) = model.generate([[3, 1, 4]], seed=2, **{**DECODE, **options})
    answer = server.complete(prompt=[3, 1, 4], seed=2, dare={"decode": options, "details": True})
    assert shown(answer) == choices_of([ids_expected])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (chat_expected,) = model.generate([messages], **DECODE)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    for content in ("Hi", parts):
        sent = [messages[0], {"role": "user", "content": content}]
        chat = server.ask("/v1/chat/completions", {"messages": sent}).json
        assert chat["choices"][0]["message"] == {"role": "assistant", "content": chat_expected.text}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_streams_of_random_numbers(family: str, served: dict[str, Served], models: dict[str, Model]) -> None:
    """With the key and the ids of an evaluation, the completions are those of the evaluation."""
    backend = NativeBackend(models[family].family, models[family].tokenizer)
    decode_options = Decode(**DECODE, temperature=1.0)
    stream, ids = Stream(9, ("evaluation", "gsm8k")), [7, 2**62]
    expected = backend.generate([Prompt("a", text="ab"), Prompt("b", text="x")], decode_options, stream, ids)
    extra = {"sample_ids": ids, "key": ["evaluation", "gsm8k"], "details": True}
    answer = served[family].complete(prompt=["ab", "x"], seed=9, temperature=1.0, dare=extra)
    assert shown(answer) == choices_of(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_concurrent_requests_do_not_touch_one_another(
    family: str, served: dict[str, Served], models: dict[str, Model]
) -> None:
    model, server, draw = models[family], served[family], random.Random(1)
    bodies = [
        {
            "prompt": "ab+" * draw.randint(1, 5),
            "seed": draw.randint(0, 9),
            "temperature": draw.choice([0.0, 1.0]),
            "max_tokens": draw.choice([4, 8, 16]),
            "n": draw.choice([1, 3]),
            "stream": draw.random() < 0.3,
        }
        for _ in range(12)
    ]

    def ask(body: dict[str, Any]) -> list[str]:
        if not body["stream"]:
            return [choice["text"] for choice in server.complete(**body)["choices"]]
        texts = [""] * body["n"]
        for chunk in server.stream("/v1/completions", **body):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        return texts

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, bodies))
    for body, texts in zip(bodies, found, strict=True):
        options = {**DECODE, "gen_length": body["max_tokens"], "temperature": body["temperature"]}
        expected = model.generate([body["prompt"]] * body["n"], seed=body["seed"], **options)
        cut = [decode(model.tokenizer, item.tokens[: body["max_tokens"]]) for item in expected]
        assert texts == cut, body


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_the_evaluation(
    family: str, served: dict[str, Served], models: dict[str, Model]
) -> None:
    model, server = models[family], served[family]
    backend = NativeBackend(model.family, model.tokenizer)
    items = [("1+1=", "2"), ("1+1=", "twenty"), ("", "abc")]
    continuations = [Continuation(Prompt("", text=context), text, 11) for context, text in items]
    options = Likelihood(num_samples=16)
    stream = Stream(3, ("evaluation", "mmlu"))
    expected = backend.log_likelihoods(continuations, options, stream)
    body = {
        "items": [{"context": context, "continuation": text, "sample_id": 11} for context, text in items],
        "likelihood": {"num_samples": 16},
        "seed": 3,
        "key": ["evaluation", "mmlu"],
    }
    data = server.ask("/v1/loglikelihood", body).json["data"]
    assert [item["log_likelihood"] for item in data] == pytest.approx(expected, abs=1e-4)
    assert [item["num_tokens"] for item in data] == [1, 6, 3]
    plain = {"items": [{"context": [1, 2], "continuation": [3, 4, 5]}], "likelihood": {"num_samples": 8}, "seed": 4}
    (value,) = server.ask("/v1/loglikelihood", plain).json["data"]
    assert value["log_likelihood"] == pytest.approx(model.log_likelihood([1, 2], [3, 4, 5], 8, seed=4), abs=1e-4)


def test_max_tokens_never_gives_more(served: dict[str, Served], models: dict[str, Model]) -> None:
    """A block model lengthens its completion to whole blocks; a client that asked for three tokens gets three."""
    (native,) = models["sdar"].generate(["ab"], gen_length=3, block_length=4, eos_stop=False)
    assert len(native.tokens) > 3
    body = {"prompt": "ab", "dare": {"decode": {"eos_stop": False}, "details": True}}
    answer = served["sdar"].complete(**body, max_tokens=3)
    assert answer["choices"][0]["dare"]["token_ids"] == native.tokens[:3]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_strings(family: str, served: dict[str, Served]) -> None:
    server = served[family]
    body = {"prompt": "ab", "max_tokens": 16, "seed": 1, "temperature": 1.0, "dare": {"decode": {"forbid_eos": True}}}
    whole = server.complete(**body)["choices"][0]["text"]
    stop = whole[5:7]
    expected = whole[: whole.index(stop)]
    cut = server.complete(**body, stop=["never there", stop])
    assert cut["choices"][0]["text"] == expected
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == len(expected) + 2
    chunks = server.stream("/v1/completions", **body, stop=stop, stream_options={"include_usage": True})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected
    assert chunks[-1]["usage"] == cut["usage"]


def test_streams_show_blocks_and_canvases(served: dict[str, Served], models: dict[str, Model]) -> None:
    server, body = served["sdar"], {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 16}
    extra = {"canvas": True, "details": True, "decode": {"eos_stop": False, "forbid_eos": True}}
    whole = server.ask("/v1/chat/completions", {**body, "dare": {**extra, "canvas": False}}).json
    chunks = server.stream("/v1/chat/completions", **body, dare=extra)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert sum(map(bool, pieces)) > 1
    last = [chunk for chunk in chunks if chunk["choices"]][-1]["choices"][0]
    assert last["finish_reason"] == "length"
    assert last["dare"]["token_ids"] == whole["choices"][0]["dare"]["token_ids"]
    canvases = [chunk["dare"]["canvas"] for chunk in chunks if "dare" in chunk]
    assert canvases
    for canvas in canvases:
        assert len(canvas["token_ids"]) == len(canvas["pieces"])
        final = dict(enumerate(last["dare"]["token_ids"]))
        for place, token in enumerate(canvas["token_ids"]):
            assert token is None or place >= 16 or token == final[place]
    steps = [canvas["step"] for canvas in canvases]
    assert steps == sorted(set(steps))


def test_facts(served: dict[str, Served]) -> None:
    server = served["llada"]
    assert server.ask("/health").json == {"status": "ok", "model": "tiny"}
    assert [card["id"] for card in server.ask("/v1/models").json["data"]] == ["tiny"]
    before = server.ask("/metrics").text
    server.complete(prompt="a")
    after = server.ask("/metrics").text
    line = 'dare_requests_total{path="/v1/completions",status="200"} '
    counts = [float(text.split(line)[1].split("\n")[0]) if line in text else 0.0 for text in (before, after)]
    assert counts[1] == counts[0] + 1
    assert "422" not in server.ask("/openapi.json").text
