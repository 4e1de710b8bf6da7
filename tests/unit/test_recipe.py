"""Loading recipes: parents, overrides, plug-in options, round trip, and one clear error for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.recipe import Recipe, load_recipe, parse_recipe

SMALL = {
    "name": "test",
    "model": {"create": {"family": "llada"}},
    "algorithm": {"name": "espo", "num_mc": 2},
    "task": {"name": "countdown"},
    "decode": {"gen_length": 8, "block_length": 8, "temperature": 1.0, "unmask": "max_prob"},
}


def _write(path: Path, data: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def _with(**changes: object) -> dict[str, object]:
    return {**SMALL, **changes}


def test_resolved_recipe_reloads_as_an_equal_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path / "a.yaml", SMALL))
    (tmp_path / "b.yaml").write_text(recipe.dump_yaml())
    assert load_recipe(tmp_path / "b.yaml") == recipe
    assert recipe.algorithm.model_extra is not None
    assert recipe.algorithm.model_extra["num_mc"] == 2


def test_child_is_merged_into_its_parent_and_overrides_come_last(tmp_path: Path) -> None:
    _write(tmp_path / "base.yaml", SMALL)
    child = {"base": "base.yaml", "name": "child", "train": {"steps": 7}, "decode": {"temperature": 0.5}}
    recipe = load_recipe(
        _write(tmp_path / "child.yaml", child), ["train.steps=9", "optimizer.lr=1e-3", "algorithm.num_mc=4"]
    )
    assert (recipe.name, recipe.train.steps, recipe.decode.temperature, recipe.decode.gen_length) == (
        "child",
        9,
        0.5,
        8,
    )
    assert recipe.optimizer.lr == 1e-3
    assert recipe.algorithm.build().options.num_mc == 4


def test_another_plugin_replaces_its_parents_options(tmp_path: Path) -> None:
    _write(tmp_path / "base.yaml", SMALL)
    recipe = load_recipe(_write(tmp_path / "child.yaml", {"base": "base.yaml", "algorithm": {"name": "d1"}}))
    assert recipe.algorithm.name == "d1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trian": {}}, ["trian: unknown key; did you mean 'train'?"]),
        ({"train": {"stepz": 3}}, ["train.stepz: unknown key; did you mean 'steps'?"]),
        ({"train": {"steps": 0}}, ["train.steps", "greater than or equal to 1", "got 0"]),
        ({"train": {"steps": 0}, "seed": -1}, ["wrong in 2 places", "train.steps", "seed"]),
        ({"algorithm": {"name": "epso"}}, ["unknown algorithm 'epso'", "did you mean 'espo'?"]),
        (
            {"algorithm": {"name": "espo", "num_mcc": 1}},
            ["num_mcc: unknown key; did you mean 'num_mc'?", "algorithms: espo"],
        ),
        ({"algorithm": {"name": "no.such.module:Thing"}}, ["cannot import 'no.such.module:Thing'"]),
        ({"task": {"name": "countdwon"}}, ["unknown task 'countdwon'", "did you mean 'countdown'?"]),
        ({"model": {}}, ["model: give exactly one of path"]),
        ({"model": {"path": "x", "create": {"family": "llada"}}}, ["model: give exactly one of path"]),
        ({"decode": {"unmask": "threshold", "steps_per_block": 4}}, ["steps_per_block", "remove steps_per_block"]),
        ({"decode": {"block_length": 4, "steps_per_block": 5}}, ["cannot fill a block of 4"]),
        ({"decode": {"threshold": 0.5}}, ["threshold needs unmask: threshold"]),
    ],
)
def test_one_clear_error(tmp_path: Path, change: dict[str, object], expected: list[str]) -> None:
    path = _write(tmp_path / "recipe.yaml", _with(**change))
    with pytest.raises(DareError) as caught:
        load_recipe(path)
    for text in [*expected, "recipe.yaml"]:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"executor": "verk"}, "unknown executor"),
        ({"model": {"create": {"family": "lada"}}}, "did you mean 'llada'?"),
        ({"task": None}, "trains on rewards"),
        ({"decode": {"gen_length": 8}}, "greedy rollouts"),
        ({"train": {"completions_per_prompt": 1}}, "at least two"),
        ({"algorithm": {"name": "sft"}, "task": None}, "nothing to train on"),
        (
            {
                "model": {"create": {"family": "sdar", "block_length": 4}},
                "decode": {"temperature": 1.0, "steps_per_block": 8},
            },
            "cannot fill a block of 4",
        ),
    ],
)
def test_impossible_pairs(change: dict[str, object], expected: str) -> None:
    with pytest.raises(DareError, match=expected.replace("?", r"\?")):
        check(parse_recipe(_with(**change), where="test"))


def test_doubtful_settings_are_warnings() -> None:
    decode = {"gen_length": 8, "temperature": 1.0, "unmask": "low_confidence", "top_p": 0.9}
    warnings = check(parse_recipe(_with(algorithm={"name": "cj_grpo"}, decode=decode), where="test"))
    assert any("trace likelihood is not exact" in warning for warning in warnings)
    assert any("top_k and top_p" in warning for warning in warnings)
    assert check(parse_recipe(SMALL, where="test")) == []


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="recipe not found"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DareError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(DareError, match="mapping"):
        load_recipe(tmp_path / "list.yaml")
    good = _write(tmp_path / "good.yaml", SMALL)
    with pytest.raises(DareError, match="key=value"):
        load_recipe(good, ["train.steps"])
    _write(tmp_path / "grandchild.yaml", {"base": "child.yaml"})
    _write(tmp_path / "child.yaml", {"base": "good.yaml"})
    with pytest.raises(DareError, match="cannot have a base"):
        load_recipe(tmp_path / "grandchild.yaml")


def test_validation_never_loads_torch(tmp_path: Path) -> None:
    path = _write(tmp_path / "recipe.yaml", SMALL)
    code = (
        "import sys; from dare.core.recipe import load_recipe; from dare.core.checks import check;"
        f"check(load_recipe({str(path)!r}));"
        "assert not {'torch', 'transformers', 'datasets', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_field_is_described_or_obvious() -> None:
    """`dare show --schema` is generated from these."""
    assert Recipe.model_json_schema()["properties"].keys() >= {"model", "algorithm", "decode", "train", "optimizer"}
