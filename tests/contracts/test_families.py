"""What every row of the families table promises: create, save, load, refuse, pad, score and generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.registry import FAMILIES
from dare.core.rng import Key
from dare.core.types import Views
from dare.families.base import Family
from dare.families.weights import find_family_type, load_family, read_spec, save_family
from dare.rollout.engine import denoise
from tests.conftest import tiny_family

NAMES = tuple(FAMILIES)
EVERY = pytest.mark.parametrize("name", NAMES)
IDS = torch.tensor([[1, 5, 9, 23, 23, 2, 7, 23, 4]])

# Per family: fields of config.json with a value that the official code knows and that is not implemented here.
NOT_IMPLEMENTED: dict[str, dict[str, Any]] = {
    "llada": {
        "activation_type": "gelu",
        "alibi": True,
        "attention_dropout": 0.1,
        "attention_layer_norm": True,
        "bias_for_layer_norm": True,
        "block_group_size": 2,
        "block_type": "sequential",
        "clip_qkv": 8.0,
        "embedding_dropout": 0.1,
        "include_bias": True,
        "include_qkv_bias": True,
        "input_emb_norm": True,
        "layer_norm_type": "default",
        "layer_norm_with_affine": False,
        "multi_query_attention": True,
        "residual_dropout": 0.1,
        "rope": False,
        "rope_full_precision": False,
        "rope_scaling": {"type": "linear", "factor": 2},
    },
    "dream": {
        "attention_dropout": 0.1,
        "head_dim": 16,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "yarn"},
        "rope_scaling": {"type": "yarn", "factor": 4},
        "use_mrope": True,
        "use_sliding_window": True,
    },
    "sdar": {
        "attention_bias": True,
        "attention_dropout": 0.1,
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "yarn"},
        "rope_scaling": {"type": "yarn", "factor": 4},
        "use_sliding_window": True,
    },
    "sdar_moe": {
        "attention_bias": True,
        "attention_dropout": 0.1,
        "hidden_act": "gelu",
        "mlp_only_layers": [5],
        "norm_topk_prob": None,
        "num_experts_per_tok": 9,
        "rope_parameters": {"rope_type": "yarn"},
        "rope_scaling": {"type": "yarn", "factor": 4},
        "use_sliding_window": True,
    },
    "llada_moe": {
        "attention_bias": True,
        "attention_dropout": 0.1,
        "clip_qkv": 8.0,
        "head_dim": 16,
        "hidden_act": "gelu",
        "moe_layer_freq": [1],
        "moe_router_score_function": "sigmoid",
        "norm_topk_prob": True,
        "num_experts_per_tok": 9,
        "partial_rotary_factor": 1.5,
        "qk_layernorm": None,
        "rope_parameters": {"rope_type": "yarn"},
        "rope_scaling": {"type": "yarn", "factor": 4},
        "routed_scaling_factor": 2.5,
        "router_num_group": 8,
        "router_topk_group": 4,
    },
    "llada2": {
        "attention_dropout": 0.1,
        "embedding_dropout": 0.1,
        "hidden_act": "gelu",
        "moe_router_enable_expert_bias": False,
        "n_group": 3,
        "norm_head": True,
        "norm_softmax": True,
        "norm_topk_prob": False,
        "num_experts_per_tok": 9,
        "output_dropout": 0.1,
        "partial_rotary_factor": 0.4,
        "rope_parameters": {"rope_type": "yarn"},
        "rope_scaling": {"type": "yarn", "factor": 4},
        "rotary_dim": 8,
        "router_dtype": "bf16",
        "score_function": "softmax",
        "topk_group": 5,
        "use_bias": True,
        "use_qk_norm": False,
        "use_qkv_bias": True,
        "use_rmsnorm": False,
        "use_sliding_window": True,
        "using_split_qkv_in_self_attention": True,
    },
}
REFUSED = [(name, field, value) for name, fields in NOT_IMPLEMENTED.items() for field, value in fields.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny checkpoint of every family; read only."""
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path_factory.mktemp(name)
        save_family(tiny_family(name), folders[name])
    return folders


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def message(folder: Path) -> str:
    with pytest.raises(DareError) as caught:
        load_family(folder)
    return str(caught.value)


def logits(family: Family, ids: Tensor, is_real: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return family.logits(ids, is_real)


# --- checkpoints


@EVERY
def test_saved_and_loaded_again_it_is_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, again = tiny_family(name), load_family(folders[name])
    assert again.spec == family.spec == read_spec(folders[name])
    assert find_family_type(again.config, where="").name == name == again.spec.name
    assert torch.equal(logits(again, IDS), logits(family, IDS))
    save_family(again, tmp_path)
    for path in folders[name].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@EVERY
def test_bfloat16_keeps_buffers_exact(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Parameters take the dtype; a routing bias stays float32 in memory and is stored as it was."""
    folder = edited(folders[name], tmp_path / "in")
    buffers = {key: torch.rand(value.shape) for key, value in load_family(folder).network.named_buffers()}
    for exact in (True, False):
        tensors = {key: value.bfloat16() for key, value in load_file(folders[name] / "model.safetensors").items()}
        tensors |= {key: value if exact else value.bfloat16() for key, value in buffers.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        family = load_family(folder)
        assert family.dtype == torch.bfloat16
        for key, buffer in family.network.named_buffers():
            assert torch.equal(buffer, tensors[key].float())
        assert logits(family, IDS).isfinite().all()
        out = tmp_path / f"out{exact}"
        out.mkdir()
        save_family(family, out)
        assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@EVERY
def test_a_new_model_changes_its_dtype(name: str) -> None:
    family = tiny_family(name).to(torch.bfloat16)
    assert {parameter.dtype for parameter in family.network.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in family.network.buffers())
    exact = logits(tiny_family(name), IDS)
    torch.testing.assert_close(logits(family, IDS), exact, atol=0.25, rtol=0.0)  # of order 1


@EVERY
def test_every_wrong_tensor_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders[name], tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    lost, misshapen = sorted(tensors)[0], sorted(tensors)[-1]
    tensors["stray.weight"] = tensors.pop(lost)
    tensors[misshapen] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    text = message(folder)
    assert f"1 missing: {lost}" in text
    assert "1 unexpected: stray.weight" in text
    assert f"1 of another shape: {misshapen} (got [3]" in text


@EVERY
def test_a_vocabulary_smaller_than_the_embedding(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    sizes = dict.fromkeys({"vocab_size", "embedding_size"} & config.keys(), 10)
    changes = {**sizes, "mask_token_id": 9, "eos_token_id": 8, "pad_token_id": 7}
    text = message(edited(folders[name], tmp_path / "c", **changes))
    assert "of another shape" in text
    assert "got [24, 32], expected [10, 32]" in text


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(
    name: str, field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = message(edited(folders[name], tmp_path / "c", **{field: value}))
    assert field in text
    assert str(tmp_path / "c") in text


@EVERY
@pytest.mark.parametrize("value", [None, 0, -1.0, "high", True])
def test_wrong_rope_theta(name: str, value: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    assert "rope_theta" in message(edited(folders[name], tmp_path / "c", rope_theta=value))


@EVERY
def test_quantised_checkpoints_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders[name], tmp_path / "c", quantization_config={"quant_method": "awq", "bits": 4})
    text = message(folder)
    assert "quantised" in text
    assert "awq" in text
    assert load_family(edited(folders[name], tmp_path / "d", quantization_config=None)).spec.name == name


LAYOUTS: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # family, changes of the config, tensors that are there then, tensors that are not
    ("sdar_moe", {"mlp_only_layers": [0]}, ["0.mlp.up_proj", "1.mlp.gate"], ["0.mlp.gate", "0.mlp.experts.0.up_proj"]),
    ("sdar_moe", {"decoder_sparse_step": 2}, ["0.mlp.up_proj", "1.mlp.gate"], ["1.mlp.up_proj"]),
    ("llada_moe", {"moe_layer_freq": [0, 1]}, ["0.mlp.up_proj", "1.mlp.experts.7.up_proj"], ["0.mlp.gate"]),
    ("llada_moe", {"shared_expert_intermediate_size": 8}, ["0.shared_expert.up_proj"], []),
    (
        "llada_moe",
        {"qk_layernorm": False, "partial_rotary_factor": 0.5},
        ["0.self_attn.q_proj"],
        ["0.self_attn.q_norm"],
    ),
    ("llada2", {"first_k_dense_replace": 0}, ["0.mlp.gate"], ["0.mlp.up_proj"]),
    ("llada2", {"num_shared_experts": 0}, ["1.mlp.gate"], ["1.mlp.shared_experts.up_proj"]),
]


@pytest.mark.parametrize(("name", "changes", "present", "absent"), LAYOUTS)
def test_configs_choose_the_layers(
    name: str, changes: dict[str, Any], present: list[str], absent: list[str], folders: dict[str, Path]
) -> None:
    config = {**json.loads((folders[name] / "config.json").read_text()), **changes}
    family_type = find_family_type(config, where="")
    network = family_type.build(config)
    tensors = network.state_dict()
    assert all(f"model.layers.{tensor}.weight" in tensors for tensor in present)
    assert not any(f"model.layers.{tensor}.weight" in tensors for tensor in absent)
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    assert logits(Family(family_type.spec(config, None), network, config), IDS).isfinite().all()


# --- what it computes


@EVERY
def test_padding_and_batch_mates_change_nothing(name: str) -> None:
    family, row = tiny_family(name), IDS[0]
    ids, is_real = torch.full((3, 12), 3), torch.zeros(3, 12, dtype=torch.bool)
    for index, start in enumerate((0, 3, 1)):
        ids[index, start : start + 9], is_real[index, start : start + 9] = row, True
    together, alone = logits(family, ids, is_real), logits(family, IDS)[0]
    for index, start in enumerate((0, 3, 1)):
        torch.testing.assert_close(together[index, start : start + 9], alone, atol=2e-5, rtol=0.0)


@EVERY
def test_views_reach_every_parameter(name: str) -> None:
    """The log-prob of every token has a gradient everywhere; experts that no token chose have a gradient of zero."""
    family, clean = tiny_family(name), torch.arange(16).view(1, 16)
    noisy = clean.clone()
    noisy[:, ::2] = family.spec.mask_id
    is_target = noisy == family.spec.mask_id
    zero = torch.zeros(1, dtype=torch.int64)
    views = Views(noisy, clean, clean, is_target, is_target.float(), zero, zero)
    logp = family.view_logp(views, family.canvas([[]], clean.tolist()))
    logp.sum().backward()  # type: ignore[no-untyped-call]
    for parameter_name, parameter in family.network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@EVERY
def test_it_generates(name: str) -> None:
    """Every masked position is filled with a token that is not the mask, and a batch changes no completion."""
    family = tiny_family(name)
    options = Decode.model_validate({"gen_length": 8, "block_length": 4, "temperature": 1.0, "eos_stop": False})
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    trace = denoise(family, prompts, options, Key(0), [11, 12])
    tokens = trace.canvas.input_BS[trace.canvas.is_completion_BS]
    assert len(tokens) >= 16
    assert not bool((tokens == family.spec.mask_id).any())
    alone = denoise(family, prompts[1:], options, Key(0), [12])
    assert torch.equal(alone.canvas.input_BS[0], trace.canvas.input_BS[1, : alone.canvas.length])
