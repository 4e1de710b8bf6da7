"""Input that once led to a traceback, a hang or too much memory, and its like: one message each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dare.core.errors import DareError
from dare.core.files import read_json, read_lines, settle, whole_directory
from dare.core.recipe import load_recipe, with_overrides
from dare.core.yaml_text import MAX_CHARACTERS, load_yaml
from dare.families.shards import Shards
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.families.weights import load_family, read_spec
from dare.training.checkpoint import list_checkpoints, read_state
from tests.golden_checkpoints import copy_checkpoint

LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "a: &a [*a]",
        "[" * 5000,
        "[" * 51 + "]" * 51,
        "name: 2001-13-45",
        "seed: " + "9" * 5000,
        "a: !!timestamp x",
        "!!python/object/apply:os.system [echo]",
        "? [a, b]\n: c",
        "a: " + "x" * MAX_CHARACTERS,
    ],
)
def test_yaml_of_any_kind_is_data_or_one_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(DareError, match="not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(DareError, match="cannot read the value"):
        with_overrides({}, [f"key={text}"])


def test_aliases_are_allowed_within_the_limit() -> None:
    assert load_yaml("a: &a {x: 1}\nb: *a") == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "", "\ufeff{}"])
def test_json_of_any_kind_is_data_or_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    (tmp_path / "log.jsonl").write_text(text + "\n")
    with pytest.raises(DareError, match="not valid JSON"):
        read_json(tmp_path / "state.json", "state")
    if text:
        with pytest.raises(DareError, match="not valid JSON"):
            read_lines(tmp_path / "log.jsonl")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llada", "n_layers", 10**9),
        ("sdar", "num_hidden_layers", 10**9),
        ("sdar_moe", "num_hidden_layers", 10**9),
        ("llada2_1", "num_hidden_layers", 10**9),
        ("dream", "num_hidden_layers", 10**9),
        ("llada", "d_model", 10**15),
        ("llada", "mlp_hidden_size", 2**31 - 1),
        ("sdar", "rope_theta", float("inf")),
        ("sdar", "rms_norm_eps", float("nan")),
        ("sdar", "rope_theta", 10**400),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    folder = copy_checkpoint(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert field in config
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(DareError):
        load_family(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/../../x.safetensors"])
def test_an_index_cannot_name_files_outside(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(DareError):
        Shards(folder)


def test_a_header_cannot_ask_for_memory_that_the_file_does_not_have(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for length in (len(header), 2**62):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(DareError):
            Shards(tmp_path)


@pytest.mark.parametrize("change", [lambda data: {**data, "version": None}, lambda data: [], lambda data: {"model": 3}])
def test_a_tokenizer_file_of_another_shape(change: Callable[[Any], Any], tmp_path: Path) -> None:
    char_tokenizer("abc").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DareError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", [[], None, "x", {"architectures": [[]]}, {"architectures": {"a": 1}}])
def test_a_config_of_another_shape(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DareError):
        read_spec(tmp_path)


@pytest.mark.parametrize("state", [{"files": 3}, {"files": {"x": None}}, {"step": -1}, {"log_bytes": [1]}])
def test_a_trainer_state_of_another_shape(state: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    whole = {"format": 1, "step": 3, "seed": 0, "log_bytes": {}, "files": {}}
    (tmp_path / "trainer" / "state.json").write_text(json.dumps({**whole, **state}))
    with pytest.raises(DareError, match="the trainer state is"):
        read_state(tmp_path)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step-999999", "step-1000000", "step-000002", "step-x", "damaged-step-000003"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_what_a_dead_process_left_is_settled(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "kept") as temporary:
        (temporary / "a").write_text("new")
    for name in (".kept.old", ".lost.old", ".kept.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("old")
    (tmp_path / ".run.json.tmp").write_text("{")
    settle(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "lost"]
    assert [(tmp_path / name / "a").read_text() for name in ("kept", "lost")] == ["new", "old"]
