"""Secrets are hidden wherever they stand; everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dare.cli import app
from dare.core.recipe import load_recipe, parse_recipe
from dare.core.secrets import HIDDEN, hide_secrets
from dare.terminal.progress import NullReporter
from dare.training.run import train
from tests.faults.matrix import RECIPES

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "tiny").glob("*.yaml"))
SECRETS = (
    "hf_" + "aB3" * 10,
    "sk-proj-" + "x1Y" * 10,
    "ghp_" + "A1b2" * 9,
    "AKIA" + "ABCDEFGH12345678",
    "xoxb-1234567890-abc",
)
WORDS = st.text(alphabet=" abcxyz=:,'\"\n{}", max_size=20)


@given(st.sampled_from(SECRETS), WORDS, WORDS)
def test_tokens_are_hidden_wherever_they_stand(secret: str, before: str, after: str) -> None:
    assert secret not in hide_secrets(f"{before} {secret} {after}")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("fetch https://user:pa55word@host/data.jsonl failed", "pa55word"),
        ("executor:\n  api_key: abc123\n", "abc123"),
        ('{"password": "letmein", "a": 1}', "letmein"),
        ("WANDB_API_KEY=0123456789abcdef", "0123456789abcdef"),
    ],
)
def test_values_of_secret_keys_are_hidden(text: str, secret: str) -> None:
    hidden = hide_secrets(text)
    assert secret not in hidden
    assert HIDDEN in hidden


@pytest.mark.parametrize("text", ["max_tokens: 64", "api_key_env: MY_KEY", "password: null", "mask_token_id: 5"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


def test_values_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "staple/staple/staple")
    monkeypatch.setenv("SOME_TOKENS", "not-a-secret-value")
    hidden = hide_secrets("correct-horse-battery staple/staple/staple not-a-secret-value")
    assert hidden == f"{HIDDEN} {HIDDEN} not-a-secret-value"


def test_shipped_recipes_have_none() -> None:
    for path in SHIPPED:
        text = load_recipe(path).dump_yaml()
        assert hide_secrets(text) == text


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    data = {**RECIPES["sft"], "name": f"run of {SECRETS[0]}", "train": {**RECIPES["sft"]["train"], "steps": 1}}
    recipe = parse_recipe(data, where="test")
    train(recipe, tmp_path, NullReporter())
    train(recipe, tmp_path, NullReporter(), is_resumed=True)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRETS[0].encode() not in path.read_bytes(), path.name
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["name"] == f"run of {HIDDEN}"
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_messages_hide_secrets() -> None:
    result = CliRunner().invoke(app, ["train", f"https://user:{SECRETS[0]}@host/recipe.yaml"])
    assert result.exit_code == 2
    assert SECRETS[0] not in result.output
