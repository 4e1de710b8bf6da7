"""Rollouts on servers are those of the trainer's own engine, and so are the updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import UNSAMPLED
from dare.diffusion.trace import to_completions
from dare.families.tokenizer import char_tokenizer
from dare.families.weights import load_family
from dare.terminal.progress import NullReporter
from dare.training.run import train
from tests.conftest import ALPHABET, save_checkpoint
from tests.numerics.rollout_servers import (
    DECODE,
    IDS,
    PROMPTS,
    Fault,
    assert_equal_traces,
    in_meta,
    local_engine,
    recipe_of,
    remote_engine,
    running,
    with_eos,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("remote"), char_tokenizer(ALPHABET)
    return {name: save_checkpoint(root / name, name, tokenizer) for name in ("sdar", "llada2")}


@pytest.mark.parametrize(("name", "engine"), [("sdar", "sglang"), ("llada2", "lmdeploy")])
def test_rollouts_are_those_of_the_own_engine(name: str, engine: str, folders: dict[str, Path]) -> None:
    """Greedy and sampled, with rows that end inside a block and prompts that end inside one."""
    with running(load_family(folders[name]), engine) as server:
        here, there = local_engine(folders[name]), remote_engine(folders[name], server, engine=engine)
        with_eos(here.family)
        with_eos(there.family)
        there.publish()
        lengths = set()
        for temperature, top_k in ((0.0, None), (1.0, None), (1.3, 5)):
            decode = DECODE.model_copy(update={"temperature": temperature, "top_k": top_k})
            expected = here.generate(PROMPTS, decode, Key(5), IDS)
            assert_equal_traces(there.generate(PROMPTS, decode, Key(5), IDS), expected)
            lengths |= set(expected.canvas.is_completion_BS.sum(-1).tolist())
        assert len(lengths) > 1
        there.close()


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_a_server_that_stops_at_eos(engine: str, folders: dict[str, Path]) -> None:
    """Completions are the same; what comes after an EOS in its block was never seen."""
    with running(load_family(folders["sdar"]), engine) as server:
        here = local_engine(folders["sdar"])
        there = remote_engine(folders["sdar"], server, engine=engine, rollout={"is_eos_ignored": False})
        with_eos(here.family)
        with_eos(there.family)
        there.publish()
        expected, found = (e.generate(PROMPTS * 4, DECODE, Key(5), list(range(20))) for e in (here, there))
        for a, b in zip(to_completions(found), to_completions(expected), strict=True):
            assert (a.tokens, a.step_map, a.finish) == (b.tokens, b.step_map, b.finish)
            assert a.logp == pytest.approx(b.logp, abs=1e-5)
        is_open_BS = found.step_map_BS == UNSAMPLED
        assert bool(is_open_BS.any())
        assert bool((found.canvas.input_BS[is_open_BS] == found.mask_id).all())
        assert torch.equal(found.canvas.is_real_BS, expected.canvas.is_real_BS)
        there.close()


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "engine", "algorithm"),
    [
        ("sdar", "sglang", {"name": "cj_grpo", "rollout_cap": 2.0}),
        ("sdar", "lmdeploy", {"name": "tracerl"}),
        ("sdar", "sglang", {"name": "espo", "beta": 0.0}),
        ("llada2", "lmdeploy", {"name": "cj_grpo", "old": "rollout", "beta": 0.0}),
        ("llada2", "sglang", {"name": "tracerl"}),
        ("llada2", "lmdeploy", {"name": "espo", "beta": 0.0}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_training_is_that_of_the_own_engine(
    name: str, engine: str, algorithm: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Equal tokens and losses step by step, so the servers had the weights of every step."""
    train(recipe_of(folders[name], algorithm=algorithm), tmp_path / "local", NullReporter())
    with running(load_family(folders[name]), engine) as server:
        recipe = recipe_of(folders[name], server, engine=engine, algorithm=algorithm)
        train(recipe, tmp_path / "remote", NullReporter())
        loads = server.faults.count("/update_weights_from_disk") + server.faults.count("/update_weights")
        assert loads == 3  # at the start and after each of two updates
    steps = list(zip(metrics_of(tmp_path / "remote"), metrics_of(tmp_path / "local"), strict=True))
    assert all(expected["grad_norm"] > 0 for _, expected in steps)
    for found, expected in steps:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=2e-6), key
    samples = [(tmp_path / run / "samples.jsonl").read_text().splitlines() for run in ("remote", "local")]
    assert [json.loads(line)["tokens"] for line in samples[0]] == [json.loads(line)["tokens"] for line in samples[1]]


def test_a_resumed_run_asks_for_the_same_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    def rows_of(seen: list[tuple[str, dict[str, Any]]]) -> list[str]:
        return sorted(json.dumps(body["sampling_params"]) for path, body in seen if path == "/generate")

    with running(load_family(folders["sdar"])) as server:
        recipe = recipe_of(folders["sdar"], server, checkpoint={"every": 1})
        train(recipe, tmp_path / "whole", NullReporter())
        whole = rows_of(server.faults.seen)
        short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1})})
        train(short, tmp_path / "part", NullReporter())
        with running(load_family(folders["sdar"])) as other:  # elsewhere, after a move
            moved = recipe_of(folders["sdar"], other, checkpoint={"every": 1})
            train(moved, tmp_path / "part", NullReporter(), is_resumed=True)
            again = rows_of(other.faults.seen)
    assert set(again) < set(whole)
    for found, expected in zip(metrics_of(tmp_path / "part"), metrics_of(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


def test_an_adapter_arrives_merged(folders: dict[str, Path]) -> None:
    lora = {"rank": 2, "alpha": 8}
    with running(load_family(folders["sdar"])) as server:
        here, there = local_engine(folders["sdar"], lora=lora), remote_engine(folders["sdar"], server, lora=lora)
        for engine in (here, there):
            for name, parameter in engine.family.network.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, 0.05)
            engine.publish()
        plain = local_engine(folders["sdar"]).generate(PROMPTS, DECODE, Key(5), IDS)
        expected = here.generate(PROMPTS, DECODE, Key(5), IDS)
        assert not torch.equal(plain.canvas.input_BS, expected.canvas.input_BS)
        assert_equal_traces(there.generate(PROMPTS, DECODE, Key(5), IDS), expected)
        assert there.family.adapter is not None  # what is trained is untouched
        there.close()


def test_a_server_in_another_dtype_shows_as_mismatch(folders: dict[str, Path], tmp_path: Path) -> None:
    with running(load_family(folders["sdar"], torch.bfloat16)) as server:
        train(recipe_of(folders["sdar"], server), tmp_path / "run", NullReporter())
    first = metrics_of(tmp_path / "run")[0]
    assert first["mismatch_share"] == 1.0
    assert 1e-4 < first["mismatch_max"] < 0.5
    assert 0.0 < first["mismatch_kl"] < 0.01


def test_truncated_weights_correct_for_a_server_with_other_numbers(folders: dict[str, Path], tmp_path: Path) -> None:
    """A server that calls every token half as likely: weights of 2, cut at 1.5, which scales the gradient."""
    algorithm = {"name": "cj_grpo", "rollout_cap": 1.5, "beta": 0.0}
    train(recipe_of(folders["sdar"], algorithm=algorithm), tmp_path / "local", NullReporter())
    halved = in_meta(output_token_logprobs=lambda rows: [[row[0] - 0.6931472, *row[1:]] for row in rows])
    with running(load_family(folders["sdar"])) as server:
        server.faults.faults.append(Fault(change=halved))
        recipe = recipe_of(folders["sdar"], server, algorithm=algorithm, rollout={"max_gap": 1.0})
        train(recipe, tmp_path / "remote", NullReporter())
    found, expected = metrics_of(tmp_path / "remote")[0], metrics_of(tmp_path / "local")[0]
    assert found["mismatch_max"] == pytest.approx(0.6931472, abs=1e-4)
    assert found["grad_norm"] == pytest.approx(1.5 * expected["grad_norm"], rel=1e-4)


def test_servers_without_step_maps_train_what_needs_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """As stock servers are: tokens alone. The update is that of the own engine; what is not known is not reported."""
    bare = Fault(change=in_meta(step_maps=None, output_token_logprobs=None))
    algorithm = {"name": "espo", "beta": 0.0}
    train(recipe_of(folders["sdar"], algorithm=algorithm), tmp_path / "local", NullReporter())
    with running(load_family(folders["sdar"])) as server:
        server.faults.faults.append(bare)
        train(recipe_of(folders["sdar"], server, algorithm=algorithm), tmp_path / "remote", NullReporter())
        with pytest.raises(DareError, match="cj_grpo replays the rollout step by step"):
            remote_engine(folders["sdar"], server)
        server.faults.faults = [Fault(change=in_meta(output_token_logprobs=None))]
        capped = {"name": "cj_grpo", "rollout_cap": 2.0}
        with pytest.raises(DareError, match="reads the log-probs of the rollout") as raised:
            remote_engine(folders["sdar"], server, algorithm=capped)
        assert "commit_logp: scored" in str(raised.value)
        with pytest.raises(DareError, match="train.correction reads the log-probs"):
            remote_engine(folders["sdar"], server, algorithm="espo", train={"correction": "geometric"})
        scored = remote_engine(folders["sdar"], server, algorithm=capped, rollout={"commit_logp": "scored"})
        expected = local_engine(folders["sdar"]).generate(PROMPTS, DECODE, Key(5), IDS)
        found = scored.generate(PROMPTS, DECODE, Key(5), IDS)
        assert not found.missing
        assert_equal_traces(found, expected)
        scored.close()
    for found_step, expected_step in zip(metrics_of(tmp_path / "remote"), metrics_of(tmp_path / "local"), strict=True):
        unknown = expected_step.keys() - found_step.keys()
        mismatch = {"rollout_gap", "mismatch_kl", "mismatch_max", "mismatch_share"}
        assert unknown | mismatch == {"nfe", "tokens_per_forward", "commit_nll"} | mismatch
        for key in ("loss", "grad_norm", "reward", "elbo_per_token"):
            assert found_step[key] == pytest.approx(expected_step[key], rel=1e-4, abs=2e-6), key
