"""Exported folders: what is in them, that merging is verified, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import dare
from dare import exports
from dare.cli import app
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import parse_recipe
from dare.core.registry import FAMILIES
from dare.core.rng import Key
from dare.families.adapter_files import read_adapter
from dare.families.base import Family
from dare.families.checkpoint import describe_base
from dare.families.lora import add_adapter
from dare.families.shards import Shards
from dare.families.weights import load_family, save_family
from dare.terminal.progress import NullReporter
from dare.training.run import train
from tests.conftest import tiny_family
from tests.numerics.test_resume import _recipe

IDS = torch.arange(24).view(2, 12) * 7 % 21
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def stored_adapter(folder: Path, base: Path, dtype: torch.dtype, *, value: float = 0.2) -> Path:
    family = load_family(base, dtype)
    adapter = add_adapter(family, LoraRecipe(rank=3, alpha=5.0), Key(4), describe_base(str(base), base))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pair in adapter.pairs():
            pair.b_OR.copy_(value * torch.randn(pair.b_OR.shape, generator=generator))
    folder.mkdir()
    save_family(family, folder)
    return folder


def stored_base(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> Path:
    family.generation_config = {"temperature": 0.5}
    folder.mkdir()
    save_family(family, folder, dtype)
    return folder


def logits(folder: Path) -> Tensor:
    return dare.load(folder, dtype=torch.float32).logits(IDS)


@every_family
@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "atol"),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.bfloat16, torch.float32, 0.3),  # the merged weights are rounded
        (torch.float32, torch.bfloat16, 2e-5),  # trained in bfloat16, merged into the base's own weights
    ],
    ids=str,
)
def test_a_merged_model_is_a_whole_checkpoint_with_the_adapters_logits(
    name: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, atol: float, tmp_path: Path
) -> None:
    base = stored_base(tmp_path / "base", tiny_family(name), base_dtype)
    folder = stored_adapter(tmp_path / "adapter", base, adapter_dtype)
    result = exports.export(folder, tmp_path / "merged")
    assert result.folder == tmp_path / "merged"
    merged, expected = Shards(tmp_path / "merged"), Shards(base)
    assert merged.shapes == expected.shapes
    assert merged.dtypes == expected.dtypes
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / file).read_text()) == json.loads((base / file).read_text())
    assert not list((tmp_path / "merged").glob("adapter*"))
    names = set(read_adapter(folder).tensors)
    old = dict(expected.tensors())
    changed = {key.removesuffix(".weight") for key, value in merged.tensors() if not torch.equal(value, old[key])}
    assert names == changed
    assert result.num_changed == len(names)
    assert result.logit_change > 0.1 > 10 * result.logit_error
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(folder), atol=atol, rtol=0.0)
    assert float((logits(tmp_path / "merged") - logits(base)).abs().max()) > 1


def test_a_run_is_exported_at_its_newest_checkpoint_and_generates_the_same(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    data: dict[str, Any] = {**_recipe(tiny_checkpoints["llada"], "sft"), "lora": {"rank": 4}}
    train(parse_recipe(data, where="test"), tmp_path / "run", NullReporter())
    result = command("export", tmp_path / "run", "--to", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "merged model, 21 tensors, float32; 14 matrices changed" in result.output
    assert command("export", tmp_path / "run", "--adapter", "--to", tmp_path / "adapter").exit_code == 0
    run, merged, adapter = (dare.load(tmp_path / name) for name in ("run", "merged", "adapter"))
    assert merged.family.adapter is None
    completions = [model.generate(["123=", "907="], gen_length=8, block_length=4) for model in (run, merged, adapter)]
    assert completions[0] == completions[2]
    assert [row.text for row in completions[1]] == [row.text for row in completions[0]]
    assert not (tmp_path / "merged" / "trainer").exists()
    for name in ("run", "adapter"):
        words = ["eval", tmp_path / name, "--recipe", tmp_path / "run" / "recipe.yaml", "--num", 4, "--json"]
        assert json.loads(command(*words).stdout)["num"] == 4
    prompt = ["--prompt", "123=", "gen_length=8", "block_length=4", "--json"]
    lines = [command("generate", tmp_path / name, *prompt).stdout for name in ("adapter", "merged")]
    assert json.loads(lines[0])["text"] == json.loads(lines[1])["text"] == completions[0][0].text


def test_whole_models_are_exported_without_their_trainer(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_checkpoints["sdar"]
    result = exports.export(source, tmp_path / "copy")
    assert (result.num_changed, result.logit_error) == (0, 0.0)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    half = exports.export(source, tmp_path / "half", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert set(Shards(tmp_path / "half").dtypes.values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_export_refuses(tmp_path: Path) -> None:
    base = stored_base(tmp_path / "base", tiny_family("llada"))
    adapter = stored_adapter(tmp_path / "adapter", base, torch.float32)
    untrained = stored_adapter(tmp_path / "untrained", base, torch.float32, value=0.0)
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there", base, base / "config.json"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DareError, match="nothing is overwritten"):
            exports.export(adapter, target)
        with pytest.raises(DareError, match="nothing is overwritten"):
            exports.export_adapter(adapter, target)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DareError, match="merging changes nothing"):
        exports.export(untrained, tmp_path / "out")
    with pytest.raises(DareError, match=r"there is no adapter to export"):
        exports.export_adapter(base, tmp_path / "out")
    with pytest.raises(DareError, match="trained on other weights"):
        exports.export(adapter, tmp_path / "out", base=stored_base(tmp_path / "seed1", tiny_family("llada", seed=1)))
    with pytest.raises(DareError, match="no checkpoint at"):
        exports.export(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))
    result = command("export", adapter, "--to", tmp_path / "there")
    assert (result.exit_code, "nothing is overwritten" in result.output) == (2, True)


def test_a_merge_that_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written file is what is verified: a weight that is not what was merged is found, and no folder appears."""
    base = stored_base(tmp_path / "base", tiny_family("sdar"))
    adapter = stored_adapter(tmp_path / "adapter", base, torch.float32)

    def save_damaged(family: Family, directory: Path, dtype: torch.dtype) -> None:
        with torch.no_grad():
            family.network.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.05)
        save_family(family, directory, dtype)

    monkeypatch.setattr(exports, "save_family", save_damaged)
    with pytest.raises(DareError, match="does not give the logits of its source"):
        exports.export(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
