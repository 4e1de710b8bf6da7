"""The same numbers on a GPU: `pytest -m gpu` where there is one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dare.core.decode import Decode
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.data.rows import EncodedRow
from dare.executors.local import LocalEngine
from dare.families.weights import load_family
from dare.rollout.engine import denoise
from dare.training.offline import rows_to_samples
from dare.training.update import plan_iterations, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]
GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3] * 9]


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_logits_equal_the_golden_numbers(name: str) -> None:
    family = load_family(GOLDEN / name, torch.float32, "cuda")
    golden = load_file(GOLDEN / name / "forward.safetensors")
    case = "full_b2_t17" if name == "llada" else "block_causal_bl4"
    with torch.no_grad():
        logits = family.logits(golden[f"{case}/input_ids"])
    torch.testing.assert_close(logits.cpu(), golden[f"{case}/logits"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llada", "sdar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_equal_those_of_the_cpu(name: str, temperature: float) -> None:
    decode = Decode(gen_length=16, block_length=4, temperature=temperature, unmask="max_prob")
    traces = [
        denoise(load_family(GOLDEN / name, torch.float32, device), PROMPTS, decode, Key(0), [1, 2, 3])
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(traces[0].canvas.input_BS, traces[1].canvas.input_BS)
    assert torch.equal(traces[0].step_map_BS, traces[1].step_map_BS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_equals_that_of_the_cpu(dtype: torch.dtype) -> None:
    recipe = parse_recipe(
        {"name": "gpu", "model": {"create": {"family": "llada"}}, "algorithm": "sft", "task": "chain_sum"}, where="test"
    )
    rows = [EncodedRow(str(index), [3, 4, 5], [6, 7, 8, 9], [True] * 4) for index in range(6)]
    results = []
    for device in ("cpu", "cuda"):
        family = copy.deepcopy(load_family(GOLDEN / "llada", dtype, device))
        engine = LocalEngine(recipe, family, num_updates=4, needs_reference=False)
        algorithm = recipe.algorithm.build()
        samples = rows_to_samples(engine, rows, None)
        (iteration,) = plan_iterations(engine, algorithm, samples, Key(0), 1)
        results.append(update(engine, algorithm, samples, iteration))
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=tolerance)
    assert results[1]["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=tolerance)
