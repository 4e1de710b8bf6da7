"""Adapters on a base in 4 or 8 bits; what needs bitsandbytes is skipped without it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dare
from dare import exports
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import OptimizerRecipe, parse_recipe
from dare.core.rng import Key
from dare.families.build import build_family
from dare.families.layers.quantized import QuantizedLinear, require_bitsandbytes
from dare.families.lora import add_adapter, merge_adapter
from dare.families.weights import load_family
from dare.terminal.progress import NullReporter
from dare.training.optim import Optimizer
from dare.training.run import train
from tests.conftest import tiny_family
from tests.numerics.test_resume import _logs, _recipe

IDS = torch.arange(24).view(2, 12) * 5 % 21
CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
both = pytest.mark.parametrize("bits", ["8bit", "4bit"])


def lora_recipe(checkpoint: Path, bits: str) -> dict[str, Any]:
    return {**_recipe(checkpoint, "sft"), "lora": {"rank": 4, "quantize_base": bits}}


def test_without_bitsandbytes_there_is_one_clear_error(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = parse_recipe(lora_recipe(tiny_checkpoints["llada"], "4bit"), where="test")
    with pytest.raises(DareError, match=r"needs bitsandbytes, which is not installed\n.*quantize_base\n  fix: pip"):
        train(recipe, tmp_path / "run", NullReporter())
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_in", "has_bias"), [(64, False), (48, True), (7, True)])
def test_a_quantized_layer_is_a_linear_layer_of_its_rounded_matrix(
    bits: Any, dtype: torch.dtype, num_in: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(num_in, 80, bias=has_bias).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 7)
    quantized = QuantizedLinear(layer, bits, require_bitsandbytes(CPU).functional)
    num_bytes = quantized.weight.numel() * quantized.weight.element_size()
    assert num_bytes == (num_in * 80 + -num_in * 80 % 64) // (2 if bits == "4bit" else 1)
    error = (quantized.full_weight() - layer.weight).detach().float().norm() / layer.weight.detach().float().norm()
    assert float(error) < {"4bit": 0.12, "8bit": 0.02}[bits]
    rounded = nn.Linear(num_in, 80, bias=has_bias).to(dtype)
    with torch.no_grad():
        rounded.weight.copy_(quantized.full_weight())
        if layer.bias is not None:
            rounded.bias.copy_(layer.bias)
    x = torch.randn(3, 5, num_in, generator=generator).to(dtype).requires_grad_()
    results = [(y := run(x), *torch.autograd.grad(y.float().sin().sum(), [x])) for run in (quantized, rounded)]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol={torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype], rtol=1e-2)
    with torch.no_grad():
        assert torch.equal(quantized(x), results[0][0])  # the pass without a gradient is the same function


@needs_bitsandbytes
@both
@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_off_is_the_quantized_base_and_only_the_adapter_is_trained(name: str, bits: Any) -> None:
    family = tiny_family(name)
    adapter = add_adapter(family, LoraRecipe(rank=4, target_modules=("q_proj",), quantize_base=bits), Key(0))
    quantized = [module for module in family.network.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 14  # all matrices, adapted or not
    with torch.no_grad():
        base = family.logits(IDS)
        assert not torch.equal(base, tiny_family(name).logits(IDS))
        for pair in adapter.pairs():
            pair.b_OR.fill_(0.1)
        with adapter.off():
            assert torch.equal(family.logits(IDS), base)
    family.logits(IDS).square().mean().backward()
    for parameter_name, parameter in family.network.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in parameter_name)
    with pytest.raises(ValueError, match="not into its quantised copy"):
        merge_adapter(family)


@needs_bitsandbytes
def test_experts_are_refused() -> None:
    with pytest.raises(DareError, match="stacked experts, which are most of this model, cannot be quantised"):
        add_adapter(tiny_family("sdar_moe"), LoraRecipe(quantize_base="4bit"), Key(0))


@needs_bitsandbytes
@both
def test_a_run_on_a_quantized_base(bits: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Resumed as it was; loaded on the quantised base it was trained on; merged into the base as it is stored."""
    data = lora_recipe(tiny_checkpoints["sdar"], bits)
    train(parse_recipe(data, where="test"), tmp_path / "whole", NullReporter())
    shorter = {**data, "train": {**data["train"], "steps": 4}, "optimizer": {"lr": 1e-2}}
    longer = {**shorter, "train": {**data["train"], "steps": 5}}
    train(parse_recipe(shorter, where="test"), tmp_path / "resumed", NullReporter())
    train(parse_recipe(longer, where="test"), tmp_path / "resumed", NullReporter(), is_resumed=True)
    train(parse_recipe(longer, where="test"), tmp_path / "once", NullReporter())
    assert _logs(tmp_path / "resumed")["metrics"] == _logs(tmp_path / "once")["metrics"]
    loaded = dare.load(tmp_path / "whole")
    assert any(isinstance(module, QuantizedLinear) for module in loaded.family.network.modules())
    again = loaded.save(tmp_path / "again")
    assert torch.equal(dare.load(again).logits(IDS), loaded.logits(IDS))
    exports.export(tmp_path / "whole", tmp_path / "merged")
    merged = load_family(tmp_path / "merged")
    assert merged.network.state_dict().keys() == load_family(tiny_checkpoints["sdar"]).network.state_dict().keys()
    whole = parse_recipe({**data, "model": {"path": str(tmp_path / "again")}, "lora": None}, where="test")
    started = build_family(whole.model, None, Key(0))
    with torch.no_grad():
        torch.testing.assert_close(started.logits(IDS), merged.logits(IDS), atol=1e-5, rtol=1e-4)


@needs_bitsandbytes
def test_eight_bit_moments_train_like_float32_ones_and_come_back_exactly() -> None:
    def optimizer(moments: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Optimizer]:
        layer = nn.Linear(96, 64).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-1, 1, 96 * 64).view(64, 96).sin())
            layer.bias.zero_()
        recipe = OptimizerRecipe.model_validate({"lr": 1e-2, "moments": moments, "weight_decay": 0.1})
        return layer, Optimizer(layer.named_parameters(), recipe, 20)

    def step(layer: nn.Linear, optimizer: Optimizer, index: int) -> None:
        x = torch.linspace(-1, 1, 8 * 96).view(8, 96).mul(index + 1).cos().to(layer.weight.dtype)
        layer(x).float().square().mean().backward()
        optimizer.step()

    (small, compact), (exact, plain) = optimizer("8bit"), optimizer("float32")
    for index in range(8):
        step(small, compact, index)
        step(exact, plain, index)
    moved = exact.weight.detach() - optimizer("float32")[0].weight.detach()
    assert float((small.weight - exact.weight).detach().norm() / moved.norm()) < 0.1
    num_bytes = {name: t.numel() * t.element_size() for name, t in compact.state().items() if "weight" in name}
    assert num_bytes["state1/weight"] == num_bytes["state2/weight"] == 96 * 64

    for dtype in (torch.float32, torch.bfloat16):
        layer, whole = optimizer("8bit", dtype)
        for index in range(3):
            step(layer, whole, index)
        other, resumed = optimizer("8bit", dtype)
        other.load_state_dict(layer.state_dict())
        resumed.load_state({name: tensor.clone() for name, tensor in whole.state().items()})
        for index in range(3, 6):
            step(layer, whole, index)
            step(other, resumed, index)
        assert torch.equal(layer.weight, other.weight)
        with pytest.raises(DareError, match="other moments"):
            optimizer("float32", dtype)[1].load_state(whole.state())


def test_eight_bit_moments_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = OptimizerRecipe.model_validate({"moments": "8bit"})
    with pytest.raises(DareError, match="optimizer.moments needs bitsandbytes, which is not installed"):
        Optimizer(nn.Linear(2, 2).named_parameters(), recipe, 1)
