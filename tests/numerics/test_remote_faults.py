"""Every way in which a rollout server can fail: what passes changes nothing, what lasts is one clear error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.executors.remote import RemoteEngine
from dare.families.tokenizer import char_tokenizer
from dare.families.weights import load_family
from dare.remote.fleet import Fleet
from dare.terminal.progress import NullReporter
from dare.training.run import train
from tests.conftest import ALPHABET, save_checkpoint
from tests.numerics.rollout_servers import (
    DECODE,
    IDS,
    PROMPTS,
    Fault,
    Running,
    assert_equal_traces,
    in_meta,
    recipe_of,
    remote_engine,
    running,
    with_eos,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("remote") / "sdar", "sdar", char_tokenizer(ALPHABET))


@pytest.fixture(scope="module")
def connected(folder: Path) -> Iterator[tuple[Running, RemoteEngine]]:
    with running(load_family(folder)) as found:
        yield found, remote_engine(folder, found)


@pytest.fixture
def pair(connected: tuple[Running, RemoteEngine]) -> tuple[Running, RemoteEngine]:
    """A server without a fault and an engine that has just met it: connecting costs more than most tests."""
    server, engine = connected
    server.faults.faults.clear()
    server.faults.seen.clear()
    meet(engine)
    return server, engine


def meet(engine: RemoteEngine, **limits: Any) -> None:
    engine.fleet.close()
    engine.fleet = Fleet(engine.options.model_copy(update=limits))


@pytest.fixture
def server(folder: Path) -> Iterator[Running]:
    with running(load_family(folder)) as found:
        yield found


PASSING = {
    "5xx": Fault(status=500, times=2),
    "busy": Fault(status=429, headers=[(b"retry-after", b"0")], times=2),
    "not json": Fault(body=b"<html>gateway</html>", times=2),
    "empty": Fault(body=b"{}", times=2),
    "half": Fault(half=True, times=2),
    "another row": Fault(change=in_meta(id="somebody else's"), times=2),
    "short row": Fault(change=lambda answer: {**answer, "output_ids": answer["output_ids"][:-1]}, times=2),
    "aborted": Fault(change=in_meta(finish_reason={"type": "abort"}), times=1),
}


def test_what_passes_changes_nothing(pair: tuple[Running, RemoteEngine]) -> None:
    server, engine = pair
    expected = engine.generate(PROMPTS, DECODE, Key(5), IDS)
    for fault in PASSING.values():
        server.faults.seen.clear()
        server.faults.faults = [copy.copy(fault)]
        assert_equal_traces(engine.generate(PROMPTS, DECODE, Key(5), IDS), expected)
        assert server.faults.count("/generate") == len(PROMPTS) + (fault.times or 0)


LASTING = {
    "status 500": Fault(status=500),
    "Invalid JSON": Fault(body=b"not json"),
    "attempts": Fault(half=True),
    "the body": Fault(body=b'[{"output_ids": [1]}]'),
    "were asked for": Fault(change=lambda answer: {**answer, "output_ids": answer["output_ids"] * 2}),
    "vocabulary": Fault(
        change=lambda answer: {
            "output_ids": [10**6] * len(answer["output_ids"]),
            **in_meta(output_token_logprobs=None)({"meta_info": answer["meta_info"]}),
        }
    ),
    "other tokens": Fault(change=in_meta(output_token_logprobs=lambda rows: rows[1:])),
    "not a log-prob": Fault(change=in_meta(output_token_logprobs=lambda rows: [[5.0, *row[1:]] for row in rows])),
    "prompt tokens": Fault(change=in_meta(prompt_tokens=2)),
    "steps for": Fault(change=in_meta(step_maps=lambda steps: steps[:-1])),
    "expected 1 to": Fault(change=in_meta(step_maps=lambda steps: [step - 1 for step in steps])),
    "one token a step": Fault(change=in_meta(step_maps=lambda steps: [1] * len(steps))),
    "expected every one": Fault(change=in_meta(step_maps=lambda steps: [1 if step == 2 else step for step in steps])),
    "weights default": Fault(change=in_meta(weight_version="default")),
}


@pytest.mark.parametrize("reason", LASTING)
def test_what_lasts_is_one_clear_error(reason: str, pair: tuple[Running, RemoteEngine]) -> None:
    server, engine = pair
    server.faults.faults.append(LASTING[reason])
    with pytest.raises(DareError) as raised:
        engine.generate(PROMPTS, DECODE, Key(5), IDS)
    text = str(raised.value)
    assert reason in text
    assert server.url in text
    assert "generating row" in text
    assert server.faults.count("/generate") <= 3 * len(PROMPTS)


@pytest.mark.parametrize("status", [302, 400, 404])
def test_what_cannot_be_repeated_is_an_error_at_once(status: int, pair: tuple[Running, RemoteEngine]) -> None:
    server, engine = pair
    server.faults.faults.append(Fault(status=status, body=b"input too long"))
    with pytest.raises(DareError, match="refuses a request") as raised:
        engine.generate(PROMPTS[:1], DECODE, Key(5), IDS[:1])
    assert server.faults.count("/generate") == 1
    assert all(text in str(raised.value) for text in (server.url, f"status {status}", "input too long"))


@pytest.mark.parametrize(
    ("limits", "reason"), [({"timeout_s": 0.1, "retries": 1}, "ReadTimeout"), ({"deadline_s": 0.2}, "took its 0.2 s")]
)
def test_a_stalled_server(limits: dict[str, Any], reason: str, pair: tuple[Running, RemoteEngine]) -> None:
    server, engine = pair
    meet(engine, **limits)
    server.faults.faults.append(Fault(stall_s=0.5))
    with pytest.raises(DareError, match="does not answer") as raised:
        engine.generate(PROMPTS[:1], DECODE, Key(5), IDS[:1])
    assert reason in str(raised.value)


def test_rows_of_a_dead_server_go_to_another(server: Running, folder: Path) -> None:
    with running(load_family(folder)) as other:
        engine = remote_engine(folder, server, other)
        expected = engine.generate(PROMPTS, DECODE, Key(5), IDS)
        assert min(server.faults.count("/generate"), other.faults.count("/generate")) > 0  # spread over both
        other.stop()
        assert_equal_traces(engine.generate(PROMPTS, DECODE, Key(5), IDS), expected)
        engine.publish()  # and the next version does not need it either
        assert_equal_traces(engine.generate(PROMPTS, DECODE, Key(5), IDS), expected)
        server.faults.faults.append(Fault(status=500))
        with pytest.raises(DareError, match="no rollout server answers") as raised:
            engine.generate(PROMPTS, DECODE, Key(5), IDS)
        assert server.url in str(raised.value)
        assert other.url in str(raised.value)


def test_a_restarted_server_gets_the_weights_again(folder: Path) -> None:
    """It comes back under its old address with the weights that it was started with."""
    first = Running(load_family(folder))
    engine = remote_engine(folder, first)
    with_eos(engine.family)
    engine.publish()
    expected = engine.generate(PROMPTS, DECODE, Key(5), IDS)
    first.stop()
    again = Running(load_family(folder), port=first.port)
    try:
        assert_equal_traces(engine.generate(PROMPTS, DECODE, Key(5), IDS), expected)
        assert again.faults.count("/update_weights_from_disk") == 1
    finally:
        engine.close()
        again.stop()


def test_updates_that_do_not_arrive(server: Running, folder: Path) -> None:
    server.faults.faults = [Fault("/update_weights_from_disk", body=b'{"success": false, "message": "no such file"}')]
    with pytest.raises(DareError, match="does not answer") as raised:
        remote_engine(folder, server)
    assert "no such file" in str(raised.value)
    server.faults.faults = [Fault("/update_weights_from_disk", body=b'{"success": true, "message": ""}')]
    with pytest.raises(DareError) as raised:
        remote_engine(folder, server)
    assert "it answers that it has default" in str(raised.value)


def test_a_server_that_does_not_say_its_version_is_probed(folder: Path) -> None:
    ignored = Fault("/update_weights", body=b"null")
    with running(load_family(folder), "lmdeploy") as server:
        engine = remote_engine(folder, server, engine="lmdeploy")
        engine.generate(PROMPTS, DECODE, Key(5), IDS)
        server.faults.faults = [ignored]
        head_VD = engine.family.network.head_weight
        head_VD.data[:4] *= 1.05  # far less than another model
        engine.publish()
        with pytest.raises(DareError, match="has not loaded the updated weights") as raised:
            engine.generate(PROMPTS, DECODE, Key(5), IDS)
        assert server.url in str(raised.value)
    other = load_family(folder)
    other.network.head_weight.data *= 100
    with running(other, "lmdeploy") as server:
        server.faults.faults = [ignored]
        with pytest.raises(DareError, match="does not run the model that is trained"):
            remote_engine(folder, server, engine="lmdeploy")


@pytest.mark.parametrize("kind", ["greedy", "one seed"])
def test_a_temperature_that_does_not_act(kind: str, server: Running, folder: Path) -> None:
    def ask(body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        changed = {"temperature": 0.0} if kind == "greedy" else {"custom_params": None, "sampling_seed": 42}
        return {**body, "sampling_params": {**sampling, **changed}}

    server.faults.faults.append(Fault(ask=ask))
    with pytest.raises(DareError, match="the temperature does not act") as raised:
        remote_engine(folder, server)
    assert server.url in str(raised.value)
    server.faults.faults.clear()
    engine = remote_engine(folder, server)
    server.faults.faults.append(Fault(ask=ask))  # only later
    with pytest.raises(DareError, match="the temperature does not act"):
        engine.generate(PROMPTS, DECODE, Key(5), IDS)
    engine.close()


def test_a_sure_model_is_not_blamed(folder: Path) -> None:
    """Equal completions are right where the policy leaves no choice."""
    with running(load_family(folder)) as server:
        engine = remote_engine(folder, server)
        engine.family.network.head_weight.data *= 1e3
        engine.publish()
        trace = engine.generate([PROMPTS[0]] * 4, DECODE, Key(5), IDS[:4])
        assert len({tuple(row) for row in trace.canvas.input_BS.tolist()}) == 1
        engine.close()


def test_what_is_wrong_at_the_start(server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.faults = [Fault("/get_model_info", change=lambda info: {**info, "model_type": "llada2_moe"})]
    with pytest.raises(DareError, match="another kind of model"):
        remote_engine(folder, server)
    server.faults.faults = [Fault("/get_server_info", change=lambda info: {**info, "dllm_algorithm": None})]
    with pytest.raises(DareError) as raised:
        remote_engine(folder, server)
    assert "--dllm-algorithm" in str(raised.value)
    server.faults.faults = [Fault("/get_server_info", change=lambda info: {**info, "context_length": 20})]
    engine = remote_engine(folder, server)
    with pytest.raises(DareError, match="longer than the rollout servers allow") as raised:
        engine.generate([PROMPTS[0], [1] * 13], DECODE, Key(5), IDS[:2])
    assert "row 1" in str(raised.value)
    engine.close()
    with running(load_family(folder), api_key="secret") as closed:
        with pytest.raises(DareError, match="refuses the API key"):
            remote_engine(folder, closed)
        with pytest.raises(DareError, match="is not set"):
            remote_engine(folder, closed, rollout={"api_key_env": "DARE_TEST_KEY"})
        monkeypatch.setenv("DARE_TEST_KEY", "secret")
        remote_engine(folder, closed, rollout={"api_key_env": "DARE_TEST_KEY"}).close()
    with pytest.raises(DareError, match="does not answer") as raised:
        remote_engine(folder, closed)
    assert closed.url in str(raised.value)


def test_masked_models_have_no_servers(server: Running, tmp_path: Path) -> None:
    masked = save_checkpoint(tmp_path / "llada", "llada", char_tokenizer(ALPHABET))
    with pytest.raises(DareError, match="rollout servers run block models"):
        remote_engine(masked, server)


def test_old_weights_are_removed(server: Running, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, server, rollout={"weights_dir": str(tmp_path / "weights")})
    train(recipe, tmp_path / "run", NullReporter())
    (last,) = (tmp_path / "weights").iterdir()
    asked = [body["model_path"] for path, body in server.faults.seen if path == "/update_weights_from_disk"]
    assert len(set(asked)) == 3
    assert asked[-1] == str(last)
