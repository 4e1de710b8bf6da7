"""What adapters promise on every family, and with every algorithm."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dare
from dare.core.checks import check
from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.recipe import Recipe, parse_recipe
from dare.core.registry import ALGORITHMS, FAMILIES, resolve
from dare.core.rng import Key
from dare.executors.choices import Local
from dare.executors.local import LocalEngine
from dare.families.adapter_files import read_adapter
from dare.families.base import Family
from dare.families.checkpoint import load_checkpoint
from dare.families.layers.moe import Experts, Route
from dare.families.lora import Adapter, add_adapter, merge_adapter, restore_adapter
from dare.families.weights import create_family, load_family, save_family
from dare.terminal.progress import NullReporter
from dare.training.run import train
from tests.conftest import tiny_family

IDS = torch.arange(24).view(2, 12) * 5 % 21
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def logits(family: Family) -> Tensor:
    with torch.no_grad():
        return family.logits(IDS)


def fill(adapter: Adapter, scale: float = 0.2) -> None:
    """Values that matter everywhere, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for pair in adapter.pairs():
            pair.b_OR.copy_(scale * torch.randn(pair.b_OR.shape, generator=generator))


def adapted(name: str, **options: Any) -> tuple[Family, Adapter]:
    family = tiny_family(name)
    return family, add_adapter(family, LoraRecipe(**{"rank": 4, **options}), Key(1))


@every_family
def test_a_new_adapter_and_an_adapter_that_is_off_are_the_base_bit_for_bit(name: str) -> None:
    expected = logits(tiny_family(name))
    state = torch.random.get_rng_state()
    family, adapter = adapted(name)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(logits(family), expected)
    fill(adapter)
    trained = logits(family)
    assert float((trained - expected).abs().max()) > 0.1
    with adapter.off():
        assert torch.equal(logits(family), expected)
    assert torch.equal(logits(family), trained)
    with pytest.raises(RuntimeError, match="inside"), adapter.off():
        raise RuntimeError("inside")
    assert torch.equal(logits(family), trained)


@every_family
def test_only_the_adapter_gets_a_gradient_and_every_pair_does(name: str) -> None:
    family, adapter = adapted(name)
    fill(adapter)
    family.logits(IDS).square().mean().backward()
    for parameter_name, parameter in family.network.named_parameters():
        assert ("lora_" in parameter_name) == parameter.requires_grad == (parameter.grad is not None), parameter_name
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all())
            assert bool((parameter.grad != 0).any()), parameter_name


@every_family
def test_all_linear_reaches_every_matrix_but_embedding_head_and_routers(name: str) -> None:
    family, adapter = adapted(name)
    matrices = {key for key, value in tiny_family(name).network.state_dict().items() if value.dim() == 2}
    left_out = matrices - {f"{module}.weight" for module in adapter.names}
    allowed = (
        "wte.weight",
        "transformer.ff_out.weight",
        "embed_tokens.weight",
        "word_embeddings.weight",
        "gate.weight",
    )
    assert all(key.endswith((*allowed, "lm_head.weight")) for key in left_out), left_out
    assert len(left_out) >= 2
    assert family.network.head_weight.requires_grad is False


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_gives_the_adapters_logits_under_the_official_names(name: str, dtype: torch.dtype) -> None:
    family = tiny_family(name).to(dtype)
    before = {key: value.clone() for key, value in family.network.state_dict().items()}
    adapter = add_adapter(family, LoraRecipe(rank=4), Key(1))
    assert {pair.a_RI.dtype for pair in adapter.pairs()} == {dtype}
    fill(adapter, 0.1)
    deltas = {p.name: adapter.recipe.scale * p.b_OR.float() @ p.a_RI.float() for p in adapter.pairs()}
    trained = logits(family)
    assert merge_adapter(family) == len(deltas)
    after = family.network.state_dict()
    assert after.keys() == before.keys()
    assert family.adapter is None
    assert all(parameter.requires_grad for parameter in family.network.parameters())
    for key, value in after.items():
        delta = deltas.get(key.removesuffix(".weight"))
        expected = before[key] if delta is None else (before[key].float() + delta).to(value.dtype)
        assert torch.equal(value, expected), key
    if dtype == torch.float32:
        torch.testing.assert_close(logits(family), trained, atol=2e-5, rtol=1e-4)
    add_adapter(family, LoraRecipe(), Key(2))  # a second one, on the merged model


@every_family
@pytest.mark.parametrize("rslora", [False, True])
def test_a_stored_adapter_comes_back_bit_for_bit(name: str, rslora: bool, tmp_path: Path) -> None:
    family, adapter = adapted(name, rslora=rslora, alpha=3.0)
    fill(adapter)
    (tmp_path / "a").mkdir()
    save_family(family, tmp_path / "a")
    again = tiny_family(name)
    stored = read_adapter(tmp_path / "a")
    assert stored.recipe.scale == adapter.recipe.scale == (1.5 if rslora else 0.75)
    restore_adapter(again, stored.recipe, stored.tensors, None)
    assert torch.equal(logits(again), logits(family))
    (tmp_path / "b").mkdir()
    save_family(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        config = (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() == config


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_a_tied_head_stays_frozen(name: str) -> None:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "mlp_size": 48, "max_length": 96}
    ids = {"vocab_size": 24, "mask_id": 23, "eos_id": 22, "pad_id": 21}
    family = create_family(name, **sizes, **ids, block_length=4, tie_embeddings=True, seed=0)
    expected = logits(family)
    adapter = add_adapter(family, LoraRecipe(), Key(0))
    assert len(adapter.names) == 7
    assert adapter.exclude_modules() == []
    assert torch.equal(logits(family), expected)
    family.logits(IDS).square().mean().backward()
    assert family.network.head_weight.grad is None


@pytest.mark.parametrize("name", ["llada", "sdar_moe"])
def test_rollouts_with_an_adapter_do_not_depend_on_their_batch(name: str) -> None:
    family, adapter = adapted(name)
    fill(adapter)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
    decode = {"gen_length": 8, "block_length": 4, "temperature": 1.0}
    results = [dare.Model(family).generate(prompts, batch_size=size, **decode) for size in (1, 3, 4)]
    assert (
        [row.tokens for row in results[0]] == [row.tokens for row in results[1]] == [row.tokens for row in results[2]]
    )


class OfficialExperts(nn.ModuleList):
    """One module per expert with its own linear layers, as published code has them."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for index in range(len(experts.gate_proj)):
            expert = nn.Module()
            for name, stacked in experts.named_parameters():
                layer = nn.Linear(stacked.shape[2], stacked.shape[1], bias=False)
                layer.weight = nn.Parameter(stacked[index].detach().clone())
                expert.add_module(name, layer)
            self.append(expert)

    def forward(self, x_ND: Tensor, route: Route) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        for index, expert in enumerate(self):
            weight_N1 = (route.weight_NA * (route.expert_NA == index)).sum(-1, keepdim=True)
            y_ND = y_ND + weight_N1 * expert.down_proj(functional.silu(expert.gate_proj(x_ND)) * expert.up_proj(x_ND))
        return y_ND


def officially_laid_out(family: Family) -> Family:
    for path, module in list(family.network.named_modules()):
        if isinstance(module, Experts):
            parent, _, child = path.rpartition(".")
            setattr(family.network.get_submodule(parent), child, OfficialExperts(module))
    return family


@every_family
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_peft_itself_loads_the_adapter_under_official_module_names(name: str, targets: str, tmp_path: Path) -> None:
    """The same logits, every key used, and nothing besides adapted (LLaDA's head is called like an MLP matrix)."""
    family, adapter = adapted(name)
    if targets == "some":
        some = tuple(adapter.target_modules()[::2])
        family, adapter = adapted(name, target_modules=some, rank=3)
    fill(adapter)
    save_family(family, tmp_path)
    official = officially_laid_out(tiny_family(name))
    assert official.network.state_dict().keys() == tiny_family(name).network.state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(official.network, tmp_path)
    wrapped = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(adapter.names)
    torch.testing.assert_close(logits(official), logits(family), atol=2e-5, rtol=1e-4)


@every_family
def test_an_adapter_that_peft_made_loads(name: str, tmp_path: Path) -> None:
    official = officially_laid_out(tiny_family(name))
    targets = adapted(name)[1].target_modules()[:3]
    config = peft.LoraConfig(
        r=2, lora_alpha=5, use_rslora=True, init_lora_weights=False, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(official.network, config)
    expected = logits(official)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_family(tiny_family(name), tmp_path / "base")
    head = {"ff_out"} & set(targets)  # peft adapts LLaDA's head too, which is refused by name
    if head:
        with pytest.raises(DareError, match=r"take no adapter\n.*\n  got: 1: model.transformer.ff_out\n"):
            load_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
        return
    family = load_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    torch.testing.assert_close(logits(family), expected, atol=2e-5, rtol=1e-4)


def test_transformers_own_qwen3_gives_the_same_logits_with_the_adapter(tmp_path: Path) -> None:
    """SDAR with blocks of one token is causal, and its modules are Qwen3's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    family, adapter = adapted("sdar")
    fill(adapter)
    save_family(family, tmp_path)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    shape = {field: family.config[field] for field in (*fields, *more)}
    config = Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": family.config["rope_theta"]})
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(tiny_family("sdar").network.state_dict())
    model = peft.PeftModel.from_pretrained(model.eval(), tmp_path)
    with torch.no_grad():
        theirs, ours = model(IDS).logits, family.logits(IDS, block_length=1)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


class Observed(LocalEngine):
    """Notes at every optimizer step which parameters have a gradient."""

    engines: list[Observed] = []  # noqa: RUF012 - the test's own list

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.before = copy.deepcopy(self.family.network.state_dict())
        Observed.engines.append(self)

    def step(self, role: Any = "policy") -> dict[str, float]:
        for name, parameter in self.family.network.named_parameters():
            assert parameter.grad is None or "lora_" in name, name
        grads = [parameter.grad for parameter in self.family.network.parameters() if parameter.grad is not None]
        assert grads
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert any(bool((grad != 0).any()) for grad in grads)
        return super().step(role)


class ObservedChoice(Local):
    def create(self, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None) -> Engine:
        return Observed.create(recipe, tokenizer, needs_reference=needs_reference, critic_lr=critic_lr)


def recipe_of(algorithm: str, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    online = resolve("algorithms", algorithm).kind == "online"
    return {
        "name": "lora",
        "executor": f"{__name__}:ObservedChoice",
        "model": {"path": str(checkpoint)},
        "lora": {"rank": 2},
        "algorithm": {"name": algorithm},
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 40, "eval_size": 4},
        "decode": {"gen_length": 8, "block_length": 4, "temperature": float(online), "unmask": "max_prob"},
        "train": {"steps": 2, "batch_size": 4, "prompts_per_step": 3, "completions_per_prompt": 4},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"num": 4, "at_start": False},
        **changes,
    }


def has_critic(name: str) -> bool:
    plugin = resolve("algorithms", name)
    return plugin(plugin.Config()).critic_lr is not None


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if not has_critic(name)])
def test_every_algorithm_trains_the_adapter_alone(
    algorithm: str, family_name: str, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options = resolve("algorithms", algorithm).Config.model_fields
    data = recipe_of(algorithm, tiny_checkpoints[family_name])
    if "beta" in options and resolve("algorithms", algorithm).kind == "online":
        data["algorithm"]["beta"] = 0.05  # so that there is a reference
    if "min_reward" in options:
        data["algorithm"]["min_reward"] = 0.0
    if resolve("algorithms", algorithm).row_kind != "completions":
        pairs = [{"prompt": f"{n}=", "chosen": "24", "rejected": f"{n}7"} for n in range(10, 18)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        data["data"] = {"path": str(tmp_path / "pairs.jsonl")}
    Observed.engines.clear()
    summary = train(parse_recipe(data, where="test"), tmp_path / "run", NullReporter())
    (engine,) = Observed.engines
    assert engine.reference is None
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(step["loss"]).isfinite() and step["grad_norm"] > 0 for step in steps)
    for name, value in engine.family.network.state_dict().items():
        assert torch.equal(value, engine.before[name]) or "lora_" in name
    base = load_family(tiny_checkpoints[family_name])
    assert engine.family.adapter is not None
    with engine.family.adapter.off():
        assert torch.equal(logits(engine.family), logits(base))
    loaded = load_checkpoint(Path(summary["checkpoint"]))
    assert torch.equal(logits(loaded), logits(engine.family))
    assert not torch.equal(logits(loaded), logits(base))


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if has_critic(name)])
def test_a_critic_is_refused(algorithm: str, tiny_checkpoints: dict[str, Path]) -> None:
    data = recipe_of(algorithm, tiny_checkpoints["llada"])
    with pytest.raises(DareError, match=f"{algorithm} trains a critic"):
        check(parse_recipe(data, where="test"))
    check(parse_recipe({**data, "lora": None}, where="test"))
