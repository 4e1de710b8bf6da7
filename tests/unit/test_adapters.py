"""Adapters and what can be wrong with them: names, files, bases, recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dare
from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.families.adapter_files import is_adapter, read_adapter
from dare.families.checkpoint import checkpoint_spec, describe_base, load_checkpoint
from dare.families.layers import expert_lora, moe
from dare.families.lora import add_adapter
from dare.families.shards import Shards
from dare.families.weights import save_family
from tests.conftest import tiny_family

BAD_RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "lora.rank: Input should be greater than or equal to 1, got 0"),
    ({"rank": -3}, "lora.rank: Input should be greater than or equal to 1, got -3"),
    ({"alpha": 0}, "lora.alpha: Input should be greater than 0, got 0"),
    ({"dropout": 0.1}, "lora.dropout: dropout is refused"),
    ({"target_modules": []}, "lora.target_modules: an adapter needs target modules"),
    ({"init": "pissa"}, "lora.init: Input should be 'kaiming' or 'gaussian', got 'pissa'"),
    ({"rnak": 4}, "lora.rnak: unknown key; did you mean 'rank'?"),
]


def recipe_data(**changes: Any) -> dict[str, Any]:
    data = {"name": "t", "model": {"path": "somewhere"}, "lora": {}, "algorithm": "sft", "task": "countdown"}
    return {**data, **changes}


@pytest.mark.parametrize(("lora", "message"), BAD_RECIPES, ids=[str(lora) for lora, _ in BAD_RECIPES])
def test_recipes_that_are_wrong(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(DareError) as error:
        parse_recipe(recipe_data(lora=lora), where="test")
    assert message in str(error.value)


def test_an_adapter_needs_a_checkpoint_under_it() -> None:
    data = recipe_data(model={"create": {"family": "llada"}})
    with pytest.raises(DareError, match="an adapter belongs to a checkpoint"):
        check(parse_recipe(data, where="test"))
    check(parse_recipe({**data, "lora": None}, where="test"))
    check(parse_recipe(recipe_data(), where="test"))


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("lora", {"quantize_base": "4bit"}, "lora.quantize_base"),
        ("optimizer", {"moments": "8bit"}, "optimizer.moments"),
    ],
)
def test_blocks_of_numbers_are_not_cut_into_shards(key: str, value: dict[str, Any], where: str) -> None:
    data = recipe_data(**{"lora": {}, key: value})
    check(parse_recipe(data, where="test"))
    check(parse_recipe({**data, key: {}, "executor": "verl"}, where="test"))
    with pytest.raises(DareError, match=rf"the verl executor has no {where}.*\n.*\n  fix: remove {where}"):
        check(parse_recipe({**data, "executor": "verl"}, where="test"))


@pytest.mark.parametrize(
    ("family", "target", "close"),
    [
        ("llada", "q_prj", "q_proj"),
        ("llada", "attn_output", "attn_out"),
        ("sdar", "gate_pro", "gate_proj"),
        ("llada2", "query_key_values", "query_key_value"),
    ],
)
def test_an_unknown_target_names_the_closest(family: str, target: str, close: str) -> None:
    with pytest.raises(DareError, match=f"unknown target module '{target}'") as error:
        add_adapter(tiny_family(family), LoraRecipe(target_modules=(target,)), Key(0))
    assert f"did you mean '{close}'?" in str(error.value)
    assert "where: lora.target_modules" in str(error.value)


@pytest.mark.parametrize(("family", "target"), [("sdar", "lm_head"), ("llada", "wte"), ("sdar_moe", "gate")])
def test_heads_embeddings_and_routers_are_no_targets(family: str, target: str) -> None:
    with pytest.raises(DareError, match=f"unknown target module '{target}'"):
        add_adapter(tiny_family(family), LoraRecipe(target_modules=(target,)), Key(0))


def test_targets_may_be_endings_of_several_parts() -> None:
    names = add_adapter(
        tiny_family("sdar"), LoraRecipe(target_modules=("layers.1.mlp.up_proj", "q_proj")), Key(0)
    ).names
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(DareError, match="all experts of a layer share one adapter"):
        add_adapter(tiny_family("sdar_moe"), LoraRecipe(target_modules=("experts.1.up_proj",)), Key(0))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of it that has been trained."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    family = tiny_family("sdar")
    save_family(family, base)
    adapter = add_adapter(family, LoraRecipe(rank=4), Key(0), describe_base(str(base), base))
    with torch.no_grad():
        for pair in adapter.pairs():
            pair.b_OR.fill_(0.1)
    save_family(family, folder)
    return base, folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def test_the_base_is_found_from_anywhere_and_its_weights_are_checked(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = folders
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    family = tiny_family("sdar")
    adapter = add_adapter(family, LoraRecipe(), Key(0), describe_base("base", Path("base")))
    assert adapter.base is not None
    assert adapter.base.path == str(base)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert is_adapter(folder)
    assert not is_adapter(base)
    ids = torch.arange(10)[None]
    expected = dare.load(folder).logits(ids)
    assert not torch.equal(expected, dare.load(base).logits(ids))
    assert checkpoint_spec(folder) == checkpoint_spec(base)

    base.rename(tmp_path / "moved")
    with pytest.raises(DareError, match=r"base model is not found\n.*\n.*\n  fix: give the folder .* --base"):
        dare.load(folder)
    moved = dare.load(folder, base=tmp_path / "moved")
    assert torch.equal(moved.logits(ids), expected)
    again = moved.save(tmp_path / "again")
    assert torch.equal(dare.load(again).logits(ids), expected)  # it names the base where it was found

    other = tmp_path / "other"
    other.mkdir()
    save_family(tiny_family("sdar", seed=1), other)
    with pytest.raises(DareError, match="trained on other weights"):
        dare.load(folder, base=other)
    with pytest.raises(DareError, match="only an adapter has a base"):
        dare.load(other, base=other)
    with pytest.raises(DareError, match="the base of an adapter is a whole model"):
        dare.load(folder, base=again)


def test_an_adapter_of_another_shape_or_family_does_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Also without a digest, as in an adapter that peft saved."""
    _, folder = folders
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)
    load_checkpoint(folder)
    for name in ("llada", "sdar_moe"):
        (tmp_path / name).mkdir()
        save_family(tiny_family(name), tmp_path / name)
        with pytest.raises(DareError, match="modules that this model does not have, or that take no adapter"):
            load_checkpoint(folder, base=tmp_path / name)
    narrow = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({narrow: tensors[narrow][:, :-1].contiguous()}))
    with pytest.raises(DareError, match="does not fit the model at model.layers.0.mlp.up_proj"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"init_lora_weights": "orthogonal"}, None),
        ({"r": 0}, "rank: Input should be greater than or equal to 1"),
        ({"r": 5}, "do not go with its config"),
        ({"lora_alpha": 0}, "alpha: Input should be greater than 0"),
        ({"lora_dropout": 0.1}, None),  # of training, which is over
        ({"target_modules": ".*_proj"}, None),  # the tensors have the names
        ({"some_later_field": 3}, None),
    ],
    ids=str,
)
def test_adapter_configs(folders: tuple[Path, Path], change: dict[str, Any], message: str | None) -> None:
    edit_config(folders[1], **change)
    if message is None:
        load_checkpoint(folders[1])
        return
    with pytest.raises(DareError) as error:
        load_checkpoint(folders[1])
    assert message in str(error.value)


def test_damaged_and_foreign_adapter_files(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DareError, match=message):
            load_checkpoint(folder)
        path.write_bytes(whole)

    path.write_bytes(whole[:-10])
    refused("cannot be read")
    path.unlink()
    refused("cannot be read")
    save_file({}, path)
    refused("the adapter is empty")
    edit_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))
    refused("do not go with its config")
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(3, 3)}))
    refused("something other than the matrices")
    (folder / "adapter_config.json").write_text("[]")
    refused("is a JSON object")
    (folder / "adapter_config.json").write_text("{")
    refused("not valid JSON")


def test_a_digest_is_of_the_content_and_not_of_the_files(tmp_path: Path) -> None:
    for name in ("one", "two", "changed", "renamed"):
        (tmp_path / name).mkdir()
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two" / "model-1.safetensors")
    save_file({"c": tensors["c"], "a": tensors["a"]}, tmp_path / "two" / "model-2.safetensors")
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({**tensors, "a": tensors["a"].view(3, 2)}, tmp_path / "changed" / "model.safetensors")
    save_file({"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]}, tmp_path / "renamed" / "model.safetensors")
    digests = {name: Shards(tmp_path / name).digest() for name in ("one", "two", "changed", "renamed")}
    assert digests["one"] == digests["two"]
    assert len(set(digests.values())) == 3


def test_the_dtype_of_a_trained_adapter_is_that_of_its_training(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders
    family = tiny_family("sdar").to(torch.bfloat16)
    add_adapter(family, LoraRecipe(), Key(0), describe_base(str(base), base))
    (tmp_path / "half").mkdir()
    save_family(family, tmp_path / "half")
    assert load_checkpoint(tmp_path / "half").dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "half", torch.float32).dtype == torch.float32
    assert load_checkpoint(folder).dtype == torch.float32
    assert read_adapter(tmp_path / "half").dtype == torch.bfloat16


def test_grouped_experts_with_adapters_equal_looped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped matmul that GPUs use runs on the CPU too; one expert has no token, the ranks differ in alignment."""
    generator = torch.Generator().manual_seed(0)
    experts = moe.Experts(4, 16, 8)
    x_ND = torch.randn(9, 16, generator=generator)
    expert_NA = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 3], [2, 0], [2, 3], [3, 2], [0, 2], [0, 3]])
    route = moe.Route(torch.zeros(9, 4), expert_NA, torch.rand(9, 2, generator=generator))
    layer = expert_lora.AdaptedExperts(experts, ["gate_proj", "down_proj"], 4, 0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = torch.zeros_like(x_ND)
    for token in range(9):
        for slot, expert in enumerate(expert_NA[token].tolist()):

            def linear(name: str, x: torch.Tensor, expert: int = expert) -> torch.Tensor:
                weight = experts.get_parameter(name)[expert]
                if name in layer.lora_A:
                    weight = weight + 0.5 * layer.lora_B[name][expert] @ layer.lora_A[name][expert]
                return weight @ x

            hidden = torch.nn.functional.silu(linear("gate_proj", x_ND[token])) * linear("up_proj", x_ND[token])
            expected[token] += route.weight_NA[token, slot] * linear("down_proj", hidden)
    looped = layer(x_ND, route)
    torch.testing.assert_close(looped, expected, atol=1e-5, rtol=1e-4)
    grads = torch.autograd.grad(looped.square().sum(), list(layer.parameters()))
    monkeypatch.setattr(moe, "can_group", lambda x, weight: True)
    monkeypatch.setattr(expert_lora, "can_group", lambda x, weight: True)
    grouped = layer(x_ND, route)
    torch.testing.assert_close(grouped, looped, atol=1e-5, rtol=1e-4)
    again = torch.autograd.grad(grouped.square().sum(), list(layer.parameters()))
    for grad, expected_grad in zip(again, grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_saving_a_model_with_an_adapter_leaves_the_base_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = folders
    model = dare.load(folder)
    saved = model.save(tmp_path / "saved")
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    shutil.rmtree(folder)
    assert torch.equal(dare.load(saved).logits(torch.arange(8)[None]), model.logits(torch.arange(8)[None]))
