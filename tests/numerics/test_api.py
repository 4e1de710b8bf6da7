"""The Python API on real tiny checkpoints: alignment, padding, keyed generation, likelihood, saving."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import dare
from dare.core.errors import DareError
from dare.core.text import Completion
from dare.model import Model
from tests.conftest import tiny_family


@pytest.fixture(params=["llada", "sdar"])
def model(request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path]) -> Model:
    return dare.load(tiny_checkpoints[request.param])


def _assert_same(got: Completion, expected: Completion) -> None:
    """Equal but for the last bits of log-probs: a matrix product rounds differently in another batch shape."""
    assert dataclasses.replace(got, logp=[]) == dataclasses.replace(expected, logp=[])
    assert got.logp == pytest.approx(expected.logp, abs=1e-5)


def test_completions_are_consistent_and_keyed_by_content(model: Model) -> None:
    prompts = ["12+7=", "3", "9-4-1="]
    options = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "seed": 3}
    together = model.generate(prompts, **options)
    for prompt, completion in zip(prompts, together, strict=True):
        _assert_same(model.generate([prompt], **options)[0], completion)
        assert len(completion.tokens) == len(completion.step_map) == len(completion.logp)
        assert completion.finish in ("eos", "length")
        assert completion.nfe > max(completion.step_map)
        assert all(value <= 0 for value in completion.logp)
    for got, expected in zip(model.generate(prompts[::-1], **options), together[::-1], strict=True):
        _assert_same(got, expected)
    reseeded = model.generate(prompts, **{**options, "seed": 4})
    assert [completion.tokens for completion in reseeded] != [completion.tokens for completion in together]
    twins = model.generate(["12+7="] * 6, **options)
    assert len({tuple(twin.tokens) for twin in twins}) > 1
    _assert_same(twins[0], together[0])


def test_ids_text_and_messages(model: Model) -> None:
    ids = model.tokenizer.encode("12+7=", add_special_tokens=False)
    assert model.generate([ids], gen_length=4, block_length=4) == model.generate(
        ["12+7="], gen_length=4, block_length=4
    )
    with pytest.raises(DareError, match="chat template"):
        model.generate([[{"role": "user", "content": "1"}]], gen_length=4, block_length=4)
    model.tokenizer = None
    completion = model.generate([ids], gen_length=4, block_length=4)[0]
    assert completion.text is None
    with pytest.raises(DareError, match="no tokenizer"):
        model.generate(["12+7="], gen_length=4)


def test_mistakes_are_named(model: Model) -> None:
    with pytest.raises(DareError, match="steps: unknown key; did you mean 'steps_per_block'"):
        model.generate(["1"], steps=4)
    with pytest.raises(DareError, match="prompts is a list"):
        model.generate("1+1=")
    with pytest.raises(DareError, match="empty"):
        model.log_likelihood("1+1=", [])
    with pytest.raises(DareError, match="(?i)long"):
        model.generate(["1" * 95], gen_length=8, block_length=4)


def test_padding_on_either_side_changes_nothing(model: Model) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    alone = model.logits(ids)
    for left, right in ((0, 3), (3, 0), (2, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=0)
        is_real = torch.nn.functional.pad(torch.ones_like(ids), (left, right)).bool()
        got = model.logits(padded, is_real)[:, left : left + ids.shape[1]]
        torch.testing.assert_close(got, alone, atol=2e-5, rtol=1e-5)


def test_block_length_overrides_the_grid_of_a_block_model() -> None:
    model = Model(tiny_family("sdar"))
    ids = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 6] = 21
    for block_length in (1, 2, 4, 12):
        difference = (
            model.logits(ids, block_length=block_length) - model.logits(changed, block_length=block_length)
        ).abs()
        start = 6 // block_length * block_length
        assert float(difference[:, :start].max() if start else 0.0) == 0.0
        assert float(difference[:, start:].amax(-1).min()) > 0.0


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_log_likelihood_is_the_elbo(name: str) -> None:
    """Against enumeration of every mask set (per block for the block model), with all strata covered equally."""
    family = tiny_family(name)
    model = Model(family)
    context, completion = [3, 4, 5, 6], [7, 8, 9]  # one block of the grid, at its start
    ids = torch.tensor([context + completion])
    total = 0.0
    for count in range(1, 4):
        values = []
        for chosen in itertools.combinations(range(3), count):
            noisy = ids.clone()
            positions = [4 + index for index in chosen]
            noisy[0, positions] = family.spec.mask_id
            logp = model.logits(noisy).log_softmax(-1)
            values.append(sum(float(logp[0, at, ids[0, at]]) for at in positions))
        total += sum(values) / len(values) / count
    estimates = [model.log_likelihood(context, completion, num_samples=300, seed=seed) for seed in range(4)]
    spread = float(torch.tensor(estimates).std())
    assert abs(sum(estimates) / 4 - total) < 4 * spread / 2 + 1e-4
    assert model.log_likelihood(context, completion, 300, seed=0) == estimates[0]


def test_one_token_is_exact(model: Model) -> None:
    family = model.family
    context = [3, 4, 5, 6]
    noisy = torch.tensor([[*context, family.spec.mask_id]])
    exact = float(model.logits(noisy)[0, -1].log_softmax(-1)[7])
    for seed in range(3):
        assert model.log_likelihood(context, [7], num_samples=5, seed=seed) == pytest.approx(exact, abs=1e-5)
    mask_id = family.spec.mask_id
    tokens = [token for token in range(family.spec.vocab_size) if token != mask_id]
    total = sum(math.exp(model.log_likelihood(context, [token])) for token in tokens)
    assert total + float(model.logits(noisy)[0, -1].softmax(-1)[mask_id]) == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(DareError, match="mask token"):
        model.log_likelihood(context, [mask_id])


def test_saved_model_is_the_model(model: Model, tmp_path: Path) -> None:
    again = dare.load(model.save(tmp_path / "copy"))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    assert torch.equal(again.logits(ids), model.logits(ids))
    assert again.generate(["1+1="], gen_length=4, block_length=4) == model.generate(
        ["1+1="], gen_length=4, block_length=4
    )


def test_evaluate_counts_what_it_says(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    task = {"name": "chain_sum", "train_size": 20, "eval_size": 20}
    result = dare.evaluate(tiny_checkpoints["llada"], task, num=12, gen_length=8, block_length=8, out=tmp_path / "eval")
    assert result["num"] == 12
    assert result["solve_rate"] == result["num_solved"] / 12
    assert result["low"] <= result["solve_rate"] <= result["high"]
    assert len((tmp_path / "eval" / "records.jsonl").read_text().splitlines()) == 12
    with pytest.raises(DareError, match="did you mean 'chain_sum'"):
        dare.evaluate(tiny_checkpoints["llada"], "chainsum")
