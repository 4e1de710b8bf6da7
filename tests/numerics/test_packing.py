"""Rows packed as documents of one sequence: the log-probs, losses and gradients of padded rows, without the padding."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.data.packing import packs, padding_share
from dare.data.rows import EncodedRow
from dare.diffusion import corrupt
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.terminal.progress import NullReporter
from dare.training.offline import rows_to_samples
from dare.training.run import train
from dare.training.update import plan_iterations, update
from tests.conftest import tiny_family

NAMES = ("llada", "dream", "llada_moe", "sdar", "sdar_moe", "llada2")
FAMILIES = {name: tiny_family(name) for name in NAMES}


def make_rows(lengths: list[tuple[int, int]], seed: int) -> list[EncodedRow]:
    """Rows of (prompt, completion) tokens; every third completion token carries no loss."""
    generator = torch.Generator().manual_seed(seed)

    def ids(num: int) -> list[int]:
        return torch.randint(0, 20, (num,), generator=generator).tolist()

    return [
        EncodedRow(f"row{i}", ids(p), ids(c), [place % 3 != 1 for place in range(c)])
        for i, (p, c) in enumerate(lengths)
    ]


def recipe_for(train: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "name": "packing",
            "model": {"create": {"family": "llada"}},
            "algorithm": {"name": "sft", "views_per_sample": 3},
            "task": "chain_sum",
            "train": {"steps": 1, **train},
        },
        where="test",
    )


def engine_for(family: Family, **train: Any) -> LocalEngine:
    return LocalEngine(recipe_for(train), copy.deepcopy(family), num_updates=1, needs_reference=False)


def sft_gradients(family: Family, rows: list[EncodedRow], **train: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step and the gradient that it leaves."""
    engine = engine_for(family, **train)
    algorithm = recipe_for(train).algorithm.build()
    samples = rows_to_samples(engine, rows, None)
    (iteration,) = plan_iterations(engine, algorithm, samples, Key(5), num=1)
    gradients: dict[str, Tensor] = {}

    def keep() -> dict[str, float]:
        parameters = engine.family.network.named_parameters()
        gradients.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return {}

    engine.optimizer.step = keep  # type: ignore[method-assign]
    return update(engine, algorithm, samples, iteration)["loss"], gradients


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 11)), min_size=1, max_size=5),
    pack_length=st.integers(1, 64),
    seed=st.integers(0, 3),
    name=st.sampled_from(NAMES),
)
def test_the_packed_loss_and_its_gradient_are_those_of_padded_rows(
    lengths: list[tuple[int, int]], pack_length: int, seed: int, name: str
) -> None:
    rows = make_rows(lengths, seed)
    loss, gradients = sft_gradients(FAMILIES[name], rows, micro_batch_views=4)
    packed_loss, packed_gradients = sft_gradients(FAMILIES[name], rows, pack_length=pack_length)
    assert packed_loss == pytest.approx(loss, rel=2e-6, abs=1e-7)
    assert packed_gradients.keys() == gradients.keys()
    for key, expected in gradients.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(packed_gradients[key], expected, rtol=1e-4, atol=1e-5 * scale + 1e-9)


def scored_views(family: Family, rows: list[EncodedRow], num_views: int) -> tuple[Samples, Views]:
    samples = rows_to_samples(engine_for(family), rows, None)
    return samples, corrupt.exact_count(samples, Key(2), num_views=num_views)


@pytest.mark.parametrize("num_views", [1, 3])  # of three, block models share the clean stream
@pytest.mark.parametrize("name", NAMES)
def test_documents_do_not_see_each_other(name: str, num_views: int) -> None:
    """A document's log-probs are the same to the last bit whatever the tokens of its neighbours are."""
    family = FAMILIES[name]
    if family.spec.name.endswith("moe") or name == "llada2":
        family = copy.deepcopy(family).to(torch.float64)  # how many tokens an expert gets changes float32 sums
    rows = make_rows([(3, 6), (5, 4), (1, 9)], seed=0)
    others = [rows[0], *make_rows([(5, 4), (5, 4), (1, 9)], seed=9)[1:]]
    logp = []
    for batch in (rows, others):
        samples, views = scored_views(family, batch, num_views)
        with torch.no_grad():
            logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R), is_packed=True)
        logp.append(logp_RS[views.sample_R == 0])
    torch.testing.assert_close(logp[0], logp[1], rtol=0, atol=0 if family.dtype == torch.float32 else 1e-6)
    assert bool((logp[0] != 0).any())


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_no_padding_reaches_the_network(name: str, num_views: int) -> None:
    family = FAMILIES[name]
    samples, views = scored_views(family, make_rows([(2, 3), (7, 9), (1, 1)], seed=0), num_views)
    shapes: list[tuple[int, ...]] = []
    embedding = next(module for module in family.network.modules() if isinstance(module, torch.nn.Embedding))
    handle = embedding.register_forward_hook(lambda _module, args, _out: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        family.view_logp(views, samples.canvas.rows(views.sample_R), is_packed=True)
    handle.remove()
    num_streams = num_views + samples.canvas.is_blockwise  # views of a sample read one clean stream
    assert shapes == [(1, num_streams * (5 + 16 + 2))]


# Which rows go together


@given(lengths=st.lists(st.integers(1, 50), max_size=40), capacity=st.integers(1, 80))
def test_packs_hold_every_row_once_within_the_capacity(lengths: list[int], capacity: int) -> None:
    found = packs(lengths, capacity)
    assert sorted(index for pack in found for index in pack) == list(range(len(lengths)))
    for pack in found:
        assert len(pack) == 1 or sum(lengths[index] for index in pack) <= capacity
    assert all(
        sum(lengths[i] for i in first) + lengths[second[0]] > capacity for first, second in itertools.pairwise(found)
    )


def test_padding_share_counts_what_the_longest_row_costs() -> None:
    assert padding_share([4, 2, 1], [[0, 1, 2]]) == pytest.approx(5 / 12)
    assert padding_share([4, 2, 1], [[0], [1, 2]]) == pytest.approx(1 / 8)
    assert padding_share([4, 2, 1], [[0], [1], [2]]) == 0.0
    assert padding_share([], []) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [{"name": "espo", "num_mc": 2}, {"name": "dtreerpo", "branching": [2, 2]}, {"name": "tracerl_value"}],
    ids=lambda algorithm: algorithm["name"],
)
@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_rl_steps_are_the_same_packed(algorithm: dict[str, Any], family: str, tmp_path: Path) -> None:
    """Ratios, a loss on logits and a critic: everything that an engine replays."""
    create = {"family": family, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "block_length": 4}
    found = []
    for name, train_options in (("padded", {"micro_batch_views": 3}), ("packed", {"pack_length": 40})):
        content = {
            "name": name,
            "model": {"create": create},
            "algorithm": algorithm,
            "task": {"name": "chain_sum", "max_digits": 3},
            "decode": {"gen_length": 8, "block_length": 4, "steps_per_block": 2, "temperature": 1.0},
            "evaluation": {"at_start": False, "num": 4},
            "train": {"steps": 2, "prompts_per_step": 3, "completions_per_prompt": 4, **train_options},
        }
        train(parse_recipe(content, where="test"), tmp_path / name, NullReporter())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    for padded, packed in zip(*found, strict=True):
        assert packed.keys() == padded.keys()
        for key in padded.keys() - {"replay_gap"}:
            assert packed[key] == pytest.approx(padded[key], rel=1e-4, abs=1e-6), key
