"""The rollout section of a recipe: what it takes and refuses, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from dare.cli import app
from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.recipe import parse_recipe
from dare.core.rollout_recipe import is_loopback

SERVER: dict[str, Any] = {"engine": "sglang", "urls": ["http://127.0.0.1:30000"]}


def checked(**changes: Any) -> Any:
    data = {
        "name": "t",
        "model": {"create": {"family": "sdar", "block_length": 4}},
        "algorithm": "cj_grpo",
        "task": "chain_sum",
        "decode": {"gen_length": 8, "temperature": 1.0, "unmask": "max_prob"},
        "rollout": SERVER,
        **changes,
    }
    recipe = parse_recipe(data, where="test")
    check(recipe)
    return recipe


def test_a_recipe_is_the_same_after_it_was_written() -> None:
    import yaml

    for rollout in (SERVER, {"engine": "lmdeploy", "urls": "http://[::1]:23333/", "is_eos_ignored": False}, {}):
        recipe = checked(rollout=rollout)
        assert parse_recipe(yaml.safe_load(recipe.dump_yaml()), where="test") == recipe
    assert checked(rollout={**SERVER, "urls": "http://localhost:30000/"}).rollout.urls == ("http://localhost:30000",)
    assert not checked(rollout={}).rollout.is_remote


@pytest.mark.parametrize(
    ("rollout", "reason"),
    [
        ({"engine": "sglang"}, "needs the servers"),
        ({"engine": "sgland", "urls": ["http://127.0.0.1:1"]}, "sglang"),
        ({"urls": ["http://127.0.0.1:1"]}, "has no further options"),
        ({**SERVER, "urls": ["127.0.0.1:30000"]}, "http://HOST:PORT"),
        ({**SERVER, "urls": ["http://127.0.0.1:1", "http://127.0.0.1:1/"]}, "listed twice"),
        ({**SERVER, "urls": ["http://me:secret@127.0.0.1:1"]}, "must not hold a key"),
        ({**SERVER, "urls": ["http://10.0.0.7:30000"]}, "not on this machine"),
        ({**SERVER, "urls": ["http://10.0.0.7:30000"], "api_key_env": "KEY"}, "weights_dir"),
        ({**SERVER, "timeout_s": 0}, "timeout_s"),
        ({**SERVER, "retries": -1}, "retries"),
    ],
)
def test_sections_that_cannot_work(rollout: dict[str, Any], reason: str) -> None:
    with pytest.raises(DareError) as raised:
        checked(rollout=rollout)
    assert reason in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": "mdpo"}, "drafts of a rollout"),
        ({"algorithm": "dtreerpo", "train": {"completions_per_prompt": 16}}, "tree of a rollout"),
        ({"algorithm": "sft", "decode": {}}, "has no rollouts"),
        ({"log": {"traces": 2}}, "log.traces"),
        ({"executor": "verl"}, "use executor: local"),
        ({"algorithm": "espo", "decode": {"temperature": 1.0, "edit_threshold": 0.5}}, "have no edit_threshold"),
        ({"decode": {"temperature": 1.0, "schedule": "timesteps", "steps_per_block": 4}}, "have no schedule"),
        ({"decode": {"temperature": 1.0, "eos_stop": False}, "rollout": {**SERVER, "is_eos_ignored": False}}, "EOS"),
    ],
)
def test_recipes_that_do_not_go_with_servers(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DareError) as raised:
        checked(**changes)
    assert reason in str(raised.value)


def test_loopback() -> None:
    assert all(is_loopback(url) for url in ("http://localhost:1", "http://127.0.0.2:1", "https://[::1]:1"))
    assert not any(is_loopback(url) for url in ("http://0.0.0.0:1", "http://10.0.0.1", "http://localhost.example.com"))


def test_the_server_command_refuses_before_it_loads() -> None:
    runner = CliRunner()
    assert "dare rollout-server runs/" in runner.invoke(app, ["rollout-server", "--help"]).output
    for words, reason in (
        (["--host", "0.0.0.0"], "other machines reach this address"),
        (["--contract", "vllm"], "unknown contract"),
        (["--api-key-env", "DARE_NO_SUCH_KEY"], "the API key is not set"),
        (["unmask=nonsense"], "unmask"),
    ):
        result = runner.invoke(app, ["rollout-server", "no-such-checkpoint", *words])
        assert result.exit_code == 2
        assert reason in result.output
