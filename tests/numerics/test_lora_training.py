"""Training with adapters: killed and resumed bit for bit, and a reference that is the base itself."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dare.core.errors import DareError
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.executors.local import LocalEngine
from dare.families.build import build_family
from dare.families.checkpoint import load_checkpoint
from dare.families.tokenizer import load_tokenizer
from dare.families.weights import load_family, save_family
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints
from dare.training.run import train
from tests.contracts.test_algorithms import samples_of
from tests.numerics.test_resume import KILLER, _logs, _recipe


def lora_recipe(checkpoint: Path, algorithm: str, dtype: str = "float32", **lora: Any) -> dict[str, Any]:
    return {**_recipe(checkpoint, algorithm, dtype), "lora": {"rank": 4, **lora}}


@pytest.mark.parametrize(
    ("family", "algorithm", "dtype", "phase", "count"),
    [
        ("llada", "sft", "bfloat16", "save", 2),
        ("llada", "coupled_grpo", "float32", "update", 4),
        ("sdar", "tracerl", "bfloat16", "rollout", 4),
    ],
)
def test_killed_run_continues_bit_for_bit(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str, algorithm: str, dtype: str, phase: str, count: int
) -> None:
    data = lora_recipe(tiny_checkpoints[family], algorithm, dtype, rslora=True)
    recipe = parse_recipe(data, where="test")
    train(recipe, tmp_path / "whole", NullReporter())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    arguments = [sys.executable, "-c", KILLER, *map(str, (tmp_path / "recipe.yaml", tmp_path / "killed", phase, count))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(arguments, check=False, timeout=120, env=environment).returncode == -signal.SIGKILL
    train(recipe, tmp_path / "killed", NullReporter(), is_resumed=True)
    assert _logs(tmp_path / "killed") == _logs(tmp_path / "whole")
    last = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "killed")]
    names = ["adapter_config.json", "adapter_model.safetensors", "trainer/optimizer.safetensors"]
    assert {str(path.relative_to(last[0])) for path in last[0].rglob("*.safetensors")} == set(names[1:])
    for name in names:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    size = sum((last[0] / name).stat().st_size for name in names)
    assert size < (tiny_checkpoints[family] / "model.safetensors").stat().st_size


def engine_of(checkpoint: Path, *, needs_reference: bool = True, **train_options: Any) -> LocalEngine:
    data = lora_recipe(checkpoint, "coupled_grpo")
    data["train"] |= train_options
    recipe = parse_recipe(data, where="test")
    return LocalEngine.create(recipe, load_tokenizer(checkpoint), needs_reference=needs_reference)


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_the_reference_is_the_base_without_a_copy(family: str, tiny_checkpoints: dict[str, Path]) -> None:
    """At every update reference log-probs are the base's, bit for bit; the policy's start there and leave."""
    engine, base = engine_of(tiny_checkpoints[family]), load_family(tiny_checkpoints[family])
    assert engine.reference is None
    samples = samples_of(base)
    algorithm = parse_recipe(_recipe(tiny_checkpoints[family], "coupled_grpo"), where="test").algorithm.build()
    views = algorithm.corrupt(samples, Key(2))
    with torch.no_grad():
        expected_RS = base.view_logp(views, samples.canvas.rows(views.sample_R))
    assert torch.equal(engine.score(views, samples), expected_RS)
    for _ in range(3):
        engine.accumulate(views, samples, views.weight_RS)
        engine.step()
        assert torch.equal(engine.score(views, samples, is_reference=True), expected_RS)
        assert not torch.equal(engine.score(views, samples), expected_RS)
    with pytest.raises(ValueError, match="without a reference"):
        engine_of(tiny_checkpoints[family], needs_reference=False).score(views, samples, is_reference=True)


def test_micro_batches_do_not_change_the_gradient(tiny_checkpoints: dict[str, Path]) -> None:
    checkpoint = tiny_checkpoints["sdar"]
    base = load_family(checkpoint)
    samples = samples_of(base)
    algorithm = parse_recipe(_recipe(checkpoint, "coupled_grpo"), where="test").algorithm.build()
    views = algorithm.corrupt(samples, Key(2))
    grads = []
    for size in (1, 3, 64):
        engine = engine_of(checkpoint, micro_batch_views=size)
        engine.accumulate(views, samples, views.weight_RS)
        grads.append([p.grad for p in engine.family.network.parameters() if p.requires_grad])
    for other in grads[1:]:
        for grad, expected in zip(other, grads[0], strict=True):
            torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_the_start_depends_on_the_seed_and_on_nothing_else(tiny_checkpoints: dict[str, Path]) -> None:
    checkpoint = tiny_checkpoints["llada"]

    def start(seed: int, **lora: Any) -> dict[str, torch.Tensor]:
        recipe = parse_recipe(lora_recipe(checkpoint, "sft", **lora), where="test")
        torch.manual_seed(seed)
        adapter = build_family(recipe.model, None, Key(seed), recipe.lora).adapter
        assert adapter is not None
        assert not any(bool(pair.b_OR.any()) for pair in adapter.pairs())
        return {pair.name: pair.a_RI.detach() for pair in adapter.pairs()}

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(again[name], a_RI) and not torch.equal(other[name], a_RI) for name, a_RI in first.items())
    alone = start(1, target_modules=["v_proj"])
    assert len(alone) == 2
    assert all(torch.equal(first[name], a_RI) for name, a_RI in alone.items())
    assert max(float(a_RI.abs().max()) for name, a_RI in first.items() if "q_proj" in name) <= 32**-0.5
    gaussian = torch.cat([a_RI.flatten() for a_RI in start(1, init="gaussian", rank=8).values()])
    assert float(gaussian.std()) == pytest.approx(1 / 8, rel=0.05)


def test_what_follows_an_adapter(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Without `lora` all weights are trained from the merged model; another adapter on top is refused."""
    data = lora_recipe(tiny_checkpoints["llada"], "sft")
    train(parse_recipe(data, where="test"), tmp_path / "lora", NullReporter())
    newest = list_checkpoints(tmp_path / "lora" / "checkpoints")[-1]
    following = {**data, "model": {"path": str(tmp_path / "lora")}}
    with pytest.raises(DareError, match=r"needs a whole model under it\n.*\n.*\n  fix: merge it first, dare export"):
        train(parse_recipe(following, where="test"), tmp_path / "next", NullReporter())
    assert not (tmp_path / "next").exists()
    recipe = parse_recipe({**following, "lora": None}, where="test")
    summary = train(recipe, tmp_path / "next", NullReporter())
    assert (Path(summary["checkpoint"]) / "model.safetensors").is_file()
    started = build_family(recipe.model.model_copy(update={"path": str(newest)}), None, Key(0))
    adapted = load_checkpoint(newest)
    assert started.adapter is None
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(started.logits(ids), adapted.logits(ids), atol=1e-5, rtol=1e-4)


def test_resume_refuses_other_weights_under_the_adapter(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    family = load_family(tiny_checkpoints["llada"])
    (tmp_path / "base").mkdir()
    save_family(family, tmp_path / "base")
    load_tokenizer(tiny_checkpoints["llada"]).save_pretrained(tmp_path / "base")
    data = lora_recipe(tmp_path / "base", "sft")
    data["train"]["steps"] = 1
    train(parse_recipe(data, where="test"), tmp_path / "run", NullReporter())
    with torch.no_grad():
        next(family.network.parameters())[3, 4] += 0.5
    save_family(family, tmp_path / "base")
    longer = parse_recipe({**data, "train": {**data["train"], "steps": 2}}, where="test")
    with pytest.raises(DareError, match="other weights than those under it now"):
        train(longer, tmp_path / "run", NullReporter(), is_resumed=True)


def test_a_copy_of_a_family_has_an_adapter_of_its_own(tiny_checkpoints: dict[str, Path]) -> None:
    family = engine_of(tiny_checkpoints["sdar"]).family
    other = copy.deepcopy(family)
    assert family.adapter is not None
    assert other.adapter is not None
    with torch.no_grad():
        for pair in other.adapter.pairs():
            pair.b_OR.fill_(0.3)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        on, untouched = other.logits(ids), family.logits(ids)
        with other.adapter.off():
            assert torch.equal(other.logits(ids), untouched)
    assert not torch.equal(on, untouched)
