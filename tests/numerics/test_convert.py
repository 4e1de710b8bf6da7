"""Conversion of autoregressive checkpoints: under a causal mask, the new network computes what the old one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dare
from dare.cli import app
from dare.core.errors import DareError
from dare.families.convert import convert_causal
from dare.families.tokenizer import char_tokenizer
from tests.conftest import ALPHABET

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
PAIRS = [("llama", "llada"), ("llama", "dream"), ("qwen2", "dream"), ("qwen3", "sdar")]


def causal_tokenizer() -> Any:
    """Characters, <pad> and <eos>, but no mask token, as an autoregressive model has it."""
    from transformers import PreTrainedTokenizerFast

    backend = char_tokenizer(ALPHABET).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def save_causal(folder: Path, layout: str, *, num_rows: int | None = None, is_tied: bool = False, **fields: Any) -> Any:
    """A tiny random model of transformers, with noisy biases and norms, saved with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = causal_tokenizer()
    sizes = SIZES | {"vocab_size": num_rows or len(tokenizer), "tie_word_embeddings": is_tied} | fields
    if layout == "qwen3":
        sizes["head_dim"] = 16  # not hidden_size / num_attention_heads
    config = AutoConfig.for_model(layout, eos_token_id=[tokenizer.eos_token_id, 5], **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def causal_logits(family: Any, ids_BT: Tensor) -> Tensor:
    """Raw logits of the converted network under the mask that conversion takes away."""
    num = ids_BT.shape[1]
    visible = torch.ones(num, num, dtype=torch.bool).tril()[None, None]
    hidden_BTD = family.hidden(ids_BT, torch.arange(num).expand_as(ids_BT), visible)
    return family.row_logits(hidden_BTD.flatten(0, 1)).view(*ids_BT.shape, -1)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("layout", "to"), PAIRS)
def test_only_the_mask_changes(layout: str, to: str, is_tied: bool, tmp_path: Path) -> None:
    model = save_causal(tmp_path, layout, is_tied=is_tied)
    num_rows = model.config.vocab_size
    ids_BT = torch.randint(0, num_rows, (2, 11), generator=torch.Generator().manual_seed(1))
    family, tokenizer = convert_causal(tmp_path, to)
    with torch.no_grad():
        logits_BTV = causal_logits(family, ids_BT)
        torch.testing.assert_close(logits_BTV[..., :num_rows], model(ids_BT).logits, atol=1e-4, rtol=0)
        # Bidirectional now: a later token changes an earlier position's logits.
        other_BT = ids_BT.clone()
        other_BT[:, -1] = (other_BT[:, -1] + 1) % num_rows
        changed = family.logits(ids_BT, block_length=11) - family.logits(other_BT, block_length=11)
        assert (changed.abs().amax((0, 2)) > 1e-4).all()
    assert family.spec.mask_id == tokenizer.mask_token_id == num_rows == logits_BTV.shape[-1] - 1
    assert family.spec.eos_ids == (tokenizer.eos_token_id, 5)
    assert (family.num_parameters - model.num_parameters()) % SIZES["hidden_size"] == 0


@pytest.mark.parametrize(("layout", "to"), [("llama", "llada"), ("qwen2", "dream"), ("qwen3", "sdar")])
def test_a_mask_token_takes_an_unused_row_and_starts_at_the_mean(layout: str, to: str, tmp_path: Path) -> None:
    num_tokens = len(causal_tokenizer())
    model = save_causal(tmp_path, layout, num_rows=num_tokens + 8)
    family, tokenizer = convert_causal(tmp_path, to)
    assert family.spec.vocab_size == num_tokens + 8
    assert family.spec.mask_id == num_tokens == len(tokenizer) - 1
    head_VD, source_VD = family.network.head_weight, model.lm_head.weight
    torch.testing.assert_close(head_VD[num_tokens], source_VD[:num_tokens].mean(0))
    is_other_V = torch.arange(num_tokens + 8) != num_tokens
    assert torch.equal(head_VD[is_other_V], source_VD[is_other_V])


@pytest.mark.parametrize(("layout", "to"), PAIRS)
def test_a_converted_checkpoint_saves_reloads_and_generates(layout: str, to: str, tmp_path: Path) -> None:
    save_causal(tmp_path / "causal", layout)
    words = ["convert", tmp_path / "causal", tmp_path / "out", "--to", to, "--block-length", 4, "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    assert ("shift kept" if to == "dream" else "shift dropped") in result.stdout
    model = dare.load(tmp_path / "out")
    assert model.family.dtype == torch.bfloat16
    assert model.family.spec.block_length == 4
    (completion,) = dare.load(tmp_path / "out", dtype="float32").generate(["1+1="], gen_length=8, eos_stop=False)
    assert completion.nfe == 8


def test_tensors_survive_a_round_trip_bit_by_bit(tmp_path: Path) -> None:
    save_causal(tmp_path / "causal", "qwen3")
    made = dare.convert(tmp_path / "causal", tmp_path / "out", "sdar").family.network.state_dict()
    read = dare.load(tmp_path / "out").family.network.state_dict()
    assert made.keys() == read.keys()
    assert all(torch.equal(made[name], read[name]) for name in made)


@pytest.mark.parametrize(
    ("layout", "to", "hint"),
    [("llama", "sdar", "llada or dream"), ("qwen2", "llada", "convert it to dream"), ("qwen3", "dream", "sdar")],
)
def test_a_layout_that_does_not_fit_names_the_family_that_does(layout: str, to: str, hint: str, tmp_path: Path) -> None:
    save_causal(tmp_path, layout)
    with pytest.raises(DareError, match="computes something") as caught:
        convert_causal(tmp_path, to)
    assert hint in str(caught.value)


def test_the_shift_belongs_to_the_family(tmp_path: Path) -> None:
    save_causal(tmp_path, "llama")
    assert convert_causal(tmp_path, "dream", shift="keep")[0].spec.is_shifted
    assert not convert_causal(tmp_path, "llada", shift="drop")[0].spec.is_shifted
    with pytest.raises(DareError, match="llada drops the shift"):
        convert_causal(tmp_path, "llada", shift="keep")
    with pytest.raises(DareError, match="dream keeps the shift"):
        convert_causal(tmp_path, "dream", shift="drop")


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 16}, "head_dim"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_what_is_not_implemented_is_refused(fields: dict[str, Any], hint: str, tmp_path: Path) -> None:
    save_causal(tmp_path, "llama", **fields)
    with pytest.raises(DareError) as caught:
        convert_causal(tmp_path, "llada")
    assert hint in str(caught.value)


def test_other_sources_are_refused(tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    with pytest.raises(DareError, match="not autoregressive"):
        convert_causal(tiny_checkpoints["llada"], "llada")
    with pytest.raises(DareError, match="checkpoint not found"):
        convert_causal(tmp_path / "absent.gguf", "llada")
    save_causal(tmp_path, "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DareError, match="no tokenizer"):
        convert_causal(tmp_path, "llada")
    result = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "out"), "--to", "lada"])
    assert result.exit_code == 2
    assert "llada" in result.stderr


def test_a_file_that_only_looks_like_gguf_is_refused(tmp_path: Path) -> None:
    """By transformers, or by the lack of the package that it reads such files with."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no weights at all")
    with pytest.raises(DareError, match=r"GGUF"):
        convert_causal(path, "llada")
