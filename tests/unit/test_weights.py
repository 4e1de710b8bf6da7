"""Checkpoints: what is loaded is what was stored, what is saved is what was loaded, and faults are said once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from dare.core.errors import DareError
from dare.core.registry import FAMILIES
from dare.families.base import Family
from dare.families.weights import (
    create_family,
    find_family_type,
    load_family,
    load_weights,
    read_spec,
    resolve_checkpoint,
    save_family,
)
from tests.golden_checkpoints import copy_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = (
    "llada",
    "llada_variant",
    "llada_tied",
    "llada_moe",
    "llada_moe_variant",
    "dream",
    "sdar",
    "sdar_tied",
    "sdar_moe",
    "llada2_0",
    "llada2_1",
)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields of config.json; `...` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def split_into_shards(folder: Path, num: int = 3) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num):
        name = f"model-{shard + 1:05d}-of-{num:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::num]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def message(call: Callable[[], object]) -> str:
    with pytest.raises(DareError) as caught:
        call()
    return str(caught.value)


def weights(family: Family) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in family.network.state_dict().items()}


def new(name: str, seed: int = 0, **changes: Any) -> Family:
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_size": 24,
        "max_length": 32,
        "mask_id": 19,
        "eos_id": 18,
        "pad_id": 17,
    }
    return create_family(name, seed=seed, **{**sizes, **changes})


# --- round trips


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_loading_and_saving_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    folder, out = copy_checkpoint(name, tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    save_family(load_family(folder), out)
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / name / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shards_load_like_one_file(name: str, tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint(name, tmp_path / "shards"))
    out = tmp_path / "out"
    out.mkdir()
    save_family(load_family(folder), out)
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / name / "model.safetensors").read_bytes()


def test_a_config_written_by_transformers_comes_back_byte_for_byte(tmp_path: Path) -> None:
    """Unknown fields, code references and the field order survive."""
    folder = copy_checkpoint("sdar", tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_sdar.SDARForCausalLM"}, "zeta": [1, {"a": None}], "dtype": "float32"}
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [119, 120], "top_k": 20}, indent=2) + "\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    save_family(load_family(folder), out)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    assert load_family(out).spec == load_family(folder).spec


def test_dtypes(tmp_path: Path) -> None:
    """None keeps what is stored; a saved dtype is named in the config and loads as itself."""
    family = load_family(GOLDEN / "llada", torch.bfloat16)
    assert family.dtype == torch.bfloat16
    save_family(family, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_family(tmp_path)
    assert again.dtype == torch.bfloat16
    reference = load_file(GOLDEN / "llada" / "model.safetensors")
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, reference[name].bfloat16())

    half = tmp_path / "half"
    half.mkdir()
    save_family(load_family(GOLDEN / "llada"), half, torch.float16)
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float16}


def test_saving_does_not_touch_the_family(tmp_path: Path) -> None:
    family = load_family(GOLDEN / "sdar")
    before, config = weights(family), json.dumps(family.config)
    save_family(family, tmp_path, torch.bfloat16)
    assert json.dumps(family.config) == config
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(family).items())


def test_weights_load_in_place(tmp_path: Path) -> None:
    source, target = new("sdar", seed=1), new("sdar", seed=2)
    parameters = list(target.network.parameters())
    save_family(source, tmp_path)
    load_weights(target, tmp_path)
    assert all(old is now for old, now in zip(parameters, target.network.parameters(), strict=True))
    assert all(torch.equal(tensor, weights(source)[name]) for name, tensor in weights(target).items())
    assert all(parameter.requires_grad for parameter in parameters)


def test_weights_of_another_model_do_not_load(tmp_path: Path) -> None:
    save_family(new("sdar", num_layers=3), tmp_path)
    family = new("sdar")
    before = weights(family)
    assert "11 unexpected" in message(lambda: load_weights(family, tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(family).items())


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    tied = new("llada", tie_embeddings=True)
    assert tied.network.head_weight is tied.network.get_parameter("model.transformer.wte.weight")
    assert new("llada").num_parameters == tied.num_parameters + 20 * 16
    save_family(tied, tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")


# --- what a config says


def test_specs_of_the_golden_checkpoints() -> None:
    llada, sdar = load_family(GOLDEN / "llada_variant").spec, load_family(GOLDEN / "sdar").spec
    assert (llada.attention, llada.block_grid, llada.block_length) == ("full", "completion", 32)
    assert (llada.mask_id, llada.eos_ids, llada.pad_id) == (120, (118,), 118)
    assert (llada.vocab_size, llada.max_length) == (128, 256)  # rows of the table, not vocab_size 122
    assert (sdar.attention, sdar.block_grid, sdar.block_length) == ("block_causal", "sequence", 4)
    assert (sdar.mask_id, sdar.eos_ids, sdar.pad_id) == (126, (120,), 120)
    assert (sdar.vocab_size, sdar.max_length) == (128, 512)
    assert not llada.is_shifted
    assert not sdar.is_shifted


def test_eos_ids_of_both_configs_count(tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint("sdar", tmp_path / "c"), eos_token_id=[5, 7])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 5]}')
    assert load_family(folder).spec.eos_ids == (5, 7, 9)
    (folder / "model.safetensors").unlink()
    assert read_spec(folder).eos_ids == (5, 7, 9)  # needs no weights


def test_absent_fields_of_published_sdar_configs() -> None:
    config = {"model_type": "sdar", "vocab_size": 151936, "eos_token_id": 151643, "max_position_embeddings": 32768}
    spec = find_family_type(config, where="").spec(config, None)
    assert (spec.mask_id, spec.block_length, spec.pad_id) == (151669, 4, 151643)


def test_absent_fields_of_published_mixtures() -> None:
    """Their mask token, block length and, in LLaDA2.x, EOS are written nowhere in the config."""
    sdar = {"model_type": "sdar_moe", "vocab_size": 151936, "eos_token_id": 151643, "max_position_embeddings": 32768}
    spec = find_family_type(sdar, where="").spec(sdar, None)
    assert (spec.name, spec.mask_id, spec.block_length, spec.pad_id) == ("sdar_moe", 151669, 4, 151643)
    llada2 = {"model_type": "llada2_moe", "vocab_size": 157184, "pad_token_id": 156892, "max_position_embeddings": 99}
    spec = find_family_type(llada2, where="").spec(llada2, None)
    assert (spec.name, spec.mask_id, spec.block_length) == ("llada2", 156895, 32)
    assert (spec.eos_ids, spec.pad_id, spec.attention, spec.block_grid) == (
        (156892,),
        156892,
        "block_causal",
        "sequence",
    )
    assert find_family_type(llada2, where="").spec(llada2, {"eos_token_id": 156900}).eos_ids == (156900,)


def test_a_small_vocabulary_needs_its_mask_token_written_down(tmp_path: Path) -> None:
    text = message(lambda: load_family(edit_config(copy_checkpoint("llada2_0", tmp_path / "c"), mask_token_id=...)))
    assert "no field 'mask_token_id'" in text
    assert "got: 156895" in text
    assert "add mask_token_id to config.json" in text


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "llada", "architectures": ["LLaDAModelLM"]}, "llada"),
        ({"model_type": "llada"}, "llada"),
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_experts": 64}, "llada_moe"),
        ({"model_type": "lladamoe", "architectures": ["LLaDAMoEModelLM"]}, "llada_moe"),
        ({"model_type": "llada", "num_experts": 64}, "llada_moe"),
        ({"model_type": "Dream", "architectures": ["DreamModel"]}, "dream"),
        ({"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "sdar"),
        ({"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]}, "sdar_moe"),
        ({"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}, "llada2"),
    ],
)
def test_families_are_recognised(config: dict[str, Any], family: str) -> None:
    assert find_family_type(config, where="").name == family


def test_the_mlp_size_of_an_old_llada_config_is_a_ratio(tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint("llada", tmp_path / "c"), mlp_hidden_size=None, mlp_ratio=4)
    assert "got [160, 64], expected [256, 64]" in message(lambda: load_family(folder))


def test_scaled_logits_are_scaled(tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint("llada", tmp_path / "c"), scale_logits=True)
    ids = torch.arange(8)[None]
    expected = load_family(GOLDEN / "llada").logits(ids) / 8
    torch.testing.assert_close(load_family(folder).logits(ids), expected, atol=1e-6, rtol=1e-6)


UNUSABLE: list[tuple[str, str, Any, str]] = [
    ("llada", "alibi", True, "got: true"),
    ("llada", "layer_norm_type", "default", 'expected: "rms"'),
    ("llada", "layer_norm_type", ..., "no field 'layer_norm_type'"),
    ("llada", "include_bias", True, "expected: false"),
    ("llada", "include_qkv_bias", True, "expected: false or null"),
    ("llada", "attention_layer_norm", True, "expected: false"),
    ("llada", "activation_type", "gelu", 'got: "gelu"'),
    ("llada", "block_type", "sequential", 'expected: "llama"'),
    ("llada", "rope", False, "expected: true"),
    ("llada", "rope_theta", "large", "a positive number"),
    ("llada", "clip_qkv", 8.0, "got: 8.0"),
    ("llada", "residual_dropout", 0.1, "got: 0.1"),
    ("llada", "n_layers", True, "an integer >= 1"),
    ("llada", "n_layers", 0, "got: 0"),
    ("llada", "n_heads", 5, "a divisor of d_model 64"),
    ("llada", "n_kv_heads", 3, "4 heads, 3 key/value heads"),
    ("llada", "d_model", 12, "an even head size"),
    ("llada", "embedding_size", 100, "an integer >= 128"),
    ("llada", "weight_tying", "no", "true or false"),
    ("llada", "mask_token_id", 128, "below the vocabulary size 128"),
    ("llada", "mask_token_id", ..., "no field 'mask_token_id'"),
    ("llada", "eos_token_id", ..., "names no EOS token"),
    ("llada", "eos_token_id", [3, "x"], 'got: "x"'),
    ("sdar", "use_sliding_window", True, "expected: false or null"),
    ("sdar", "rope_scaling", {"type": "yarn", "factor": 4}, "expected: null"),
    ("sdar", "attention_bias", True, "expected: false"),
    ("sdar", "hidden_act", "gelu", 'expected: "silu"'),
    ("sdar", "head_dim", ..., "no field 'head_dim'"),
    ("sdar", "num_key_value_heads", 3, "key/value heads"),
    ("sdar", "mask_token_id", ..., "got: 151669"),
    ("sdar", "block_size", 0, "an integer >= 1"),
    ("sdar", "block_grid", "response", "sequence or completion"),
]


@pytest.mark.parametrize(("name", "field", "value", "expected"), UNUSABLE)
def test_what_is_not_implemented_is_refused(name: str, field: str, value: Any, expected: str, tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint(name, tmp_path / "c"), **{field: value})
    text = message(lambda: load_family(folder))
    assert expected in text
    assert str(folder) in text


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        {"model_type": "llada", "architectures": ["LLaDAVModelLM"]},
        {"architectures": None},
        {},
    ],
)
def test_other_checkpoints_are_of_no_family(config: dict[str, Any]) -> None:
    text = message(lambda: find_family_type(config, where="somewhere"))
    assert "no known family" in text
    assert str(config.get("model_type")) in text
    assert all(f"({name})" in text for name in FAMILIES)
    assert "SDARMoeForCausalLM (sdar_moe)" in text


# --- broken folders


def test_a_missing_config(tmp_path: Path) -> None:
    assert "model config not found" in message(lambda: load_family(tmp_path))


@pytest.mark.parametrize(("content", "expected"), [("{", "not valid JSON"), ("[1]", "a config is a JSON object")])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_object(content: str, expected: str, file: str, tmp_path: Path) -> None:
    folder = copy_checkpoint("llada", tmp_path / "c")
    (folder / file).write_text(content)
    text = message(lambda: load_family(folder))
    assert expected in text
    assert file in text


def test_missing_weights(tmp_path: Path) -> None:
    folder = copy_checkpoint("llada", tmp_path / "c")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in message(lambda: load_family(folder))


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    folder = copy_checkpoint("llada", tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = message(lambda: load_family(folder))
    assert "stored as pickles" in text
    assert "pytorch_model.bin" in text
    assert "convert the checkpoint to safetensors" in text


@pytest.mark.parametrize("kept", [0, 5, 1000, 445000])
def test_truncated_weights(kept: int, tmp_path: Path) -> None:
    path = copy_checkpoint("llada", tmp_path / "c") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    text = message(lambda: load_family(path.parent))
    assert "truncated or not a safetensors file" in text
    assert f"{kept} bytes" in text


def test_weights_that_are_something_else(tmp_path: Path) -> None:
    path = copy_checkpoint("llada", tmp_path / "c") / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "not a safetensors file" in message(lambda: load_family(path.parent))


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada", tmp_path / "c"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    text = message(lambda: load_family(folder))
    assert "1 of 3 weight shards are missing" in text
    assert "model-00002-of-00003.safetensors" in text


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada", tmp_path / "c"))
    (folder / "model.safetensors.index.json").unlink()
    text = message(lambda: load_family(folder))
    assert "the index of the weight shards is missing" in text
    assert "model-00001-of-00003.safetensors" in text


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_half_downloaded_shard(kept: float, tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada2_0", tmp_path / "c"))
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    text = message(lambda: load_family(folder))
    assert "truncated or not a safetensors file" in text
    assert path.name in text


def test_an_old_shard_among_new_ones(tmp_path: Path) -> None:
    """The index counts for which files are read; their headers for what is in them."""
    folder = split_into_shards(copy_checkpoint("dream", tmp_path / "c"))
    path = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(path)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, path)
    assert f"1 missing: {lost}" in message(lambda: load_family(folder))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_shards(index: str, tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada", tmp_path / "c"))
    (folder / "model.safetensors.index.json").write_text(index)
    assert "names no shards" in message(lambda: load_family(folder))


def test_an_index_that_leaves_its_folder(tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada", tmp_path / "c"))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    assert "outside its folder" in message(lambda: load_family(folder))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = split_into_shards(copy_checkpoint("llada", tmp_path / "c"), num=2)
    first, second = sorted(folder.glob("model-*"))
    save_file(load_file(first) | load_file(second), second)
    assert "stored in two shards" in message(lambda: load_family(folder))


def test_every_wrong_tensor_is_counted_in_one_error(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "blocks.1" in name]:
            tensors[name.replace("blocks.1", "blocks.7")] = tensors.pop(name)
        tensors["model.transformer.ln_f.weight"] = torch.ones(65)

    folder = rewrite(copy_checkpoint("llada", tmp_path / "c"), change)
    text = message(lambda: load_family(folder))
    assert "9 missing: model.transformer.blocks.1." in text
    assert "9 unexpected: model.transformer.blocks.7." in text
    assert "1 of another shape: model.transformer.ln_f.weight (got [65], expected [64])" in text
    assert text.count("blocks.1.") == 5
    assert "expected: 21 tensors" in text


def test_a_head_beside_tied_embeddings_is_unexpected(tmp_path: Path) -> None:
    folder = copy_checkpoint("sdar_tied", tmp_path / "c")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 48)}))
    assert "1 unexpected: lm_head.weight" in message(lambda: load_family(folder))


def test_an_untied_config_wants_its_head(tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint("sdar_tied", tmp_path / "c"), tie_word_embeddings=False)
    assert "1 missing: lm_head.weight" in message(lambda: load_family(folder))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = copy_checkpoint("sdar", tmp_path / "c")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    text = message(lambda: load_family(folder))
    assert "model.norm.weight" in text
    assert "got: I8" in text


def test_mixed_dtypes_need_a_choice(tmp_path: Path) -> None:
    folder = copy_checkpoint("sdar", tmp_path / "c")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}))
    assert "several dtypes" in message(lambda: load_family(folder))
    assert load_family(folder, torch.float32).dtype == torch.float32


def test_weights_that_cannot_be_written(tmp_path: Path) -> None:
    assert "cannot be written" in message(lambda: save_family(new("llada"), tmp_path / "absent"))


# --- new models


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_a_new_model_depends_on_its_seed_and_on_nothing_else(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = new(name), new(name), new(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in weights(one).items():
        assert torch.equal(tensor, weights(same)[key])
        assert tensor.dim() == 1 or not torch.equal(tensor, weights(other)[key])
    save_family(one, tmp_path)
    again = load_family(tmp_path)
    assert again.spec == one.spec
    ids = torch.arange(12)[None]
    assert torch.equal(again.logits(ids), one.logits(ids))


@pytest.mark.parametrize("name", ["llada", "sdar"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_new_model_starts_near_uniform(name: str, is_tied: bool) -> None:
    """Logits of order 1, so the loss starts near log(vocabulary) and no token is favoured."""
    family = new(name, hidden_size=64, num_layers=4, num_heads=4, vocab_size=64, tie_embeddings=is_tied)
    logits = family.logits(torch.full((4, 16), 19))
    assert 0.5 < logits.std().item() < 1.5
    deep = {key: tensor for key, tensor in weights(family).items() if family.network.is_residual_output(key)}
    assert len(deep) == 8
    for tensor in deep.values():
        assert tensor.std().item() == pytest.approx((tensor.shape[1] * 8) ** -0.5, rel=0.1)


def test_sizes_reach_the_config() -> None:
    sdar = new("sdar", num_kv_heads=1, block_length=8)
    assert sdar.spec.block_length == 8
    assert (sdar.network.num_kv_heads, sdar.network.head_dim, sdar.network.num_layers) == (1, 8, 2)
    assert (sdar.spec.mask_id, sdar.spec.eos_ids, sdar.spec.pad_id) == (19, (18,), 17)
    assert (sdar.spec.vocab_size, sdar.spec.max_length) == (20, 32)
    assert new("sdar").spec.block_length == 4
    llada = new("llada")
    assert (llada.spec.block_length, llada.network.num_kv_heads) == (32, 2)
    assert new("llada", block_length=8).spec.block_length == 8


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert "divisor of d_model" in message(lambda: new("llada", num_heads=3))
    assert "below the vocabulary size 20" in message(lambda: new("sdar", mask_id=20))
    assert "did you mean 'llada'?" in message(lambda: new("lada"))


# --- folders and hub ids


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint at" in message(lambda: resolve_checkpoint(tmp_path / "absent"))
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "a checkpoint is a folder" in message(lambda: resolve_checkpoint(file))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that cannot be reached, with an empty local store."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_id_without_network(offline_hub: Path) -> None:
    text = message(lambda: resolve_checkpoint("some-lab/some-model"))
    assert "no folder some-lab/some-model, and it cannot be fetched" in text
    assert "check the name and the network" in text


def test_a_hub_id_that_was_fetched_before(offline_hub: Path) -> None:
    store = offline_hub / "models--some-lab--some-model"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("a" * 40)
    (store / "snapshots").mkdir()
    copy_checkpoint("sdar", store / "snapshots" / ("a" * 40))
    folder = resolve_checkpoint("some-lab/some-model")
    assert load_family(folder).spec.mask_id == 126


# --- what only others need


def test_code_travels_with_its_checkpoint_and_is_not_run(tmp_path: Path) -> None:
    folder = edit_config(copy_checkpoint("sdar", tmp_path / "in"), auto_map={"AutoModel": "modeling_sdar.X"})
    code = b"raise SystemExit('this must never run')\r\n"
    for name in ("modeling_sdar.py", "helper.py"):
        (folder / name).write_bytes(code)
    (folder / "README.md").write_text("not a part of it")
    out = tmp_path / "out"
    out.mkdir()
    save_family(load_family(folder), out)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "helper.py",
        "model.safetensors",
        "modeling_sdar.py",
    ]
    assert (out / "helper.py").read_bytes() == code
    edit_config(folder, auto_map=...)
    assert load_family(folder).code_files == {}


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.endswith(("_tied", "_variant", "2_1"))])
def test_a_new_config_has_the_fields_of_a_published_one(name: str) -> None:
    """So that the official code, whose own defaults are sometimes others, builds the same network."""
    published = json.loads((GOLDEN / name / "config.json").read_text())
    made = new({"llada2_0": "llada2"}.get(name, name)).config
    of_training = {"alibi_bias_max", "attn_implementation", "init_cutoff_factor", "init_fn", "init_std", "precision"}
    assert published.keys() - made.keys() <= {"torch_dtype", "dtype", *of_training}
    classes = made["auto_map"]
    assert classes["AutoModelForCausalLM"].endswith(f".{published['architectures'][0]}")
    assert classes["AutoConfig"].startswith("configuration_")
    for field, value in published.items():
        if isinstance(value, bool) and field not in ("fuse_cross_entropy",):
            assert made[field] == value, field
