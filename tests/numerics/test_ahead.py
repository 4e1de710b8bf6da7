"""Rollouts a step ahead: whose weights make which, a resume that loses nothing, and weights that correct for it."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dare.core.checks import check
from dare.core.decode import Decode
from dare.core.errors import DareError, Interrupted
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.core.types import Samples
from dare.diffusion.trace import scored_mask
from dare.executors.local import LocalEngine
from dare.rollout.engine import denoise
from dare.terminal.progress import NullReporter
from dare.training.ahead import Rollouts
from dare.training.checkpoint import list_checkpoints
from dare.training.correction import corrected, log_weights
from dare.training.run import train
from tests.golden_checkpoints import golden_family


def recipe_of(path: str | Path, algorithm: str, steps: int = 4, **options: Any) -> Recipe:
    decode = {"gen_length": 8, "block_length": 4, "temperature": 1.0, "unmask": "max_prob"}
    data = {
        "name": "ahead",
        "model": {"path": str(path)},
        "algorithm": algorithm,
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 40, "eval_size": 8},
        "decode": {**decode, **options.pop("decode", {})},
        "train": {"steps": steps, "prompts_per_step": 3, "completions_per_prompt": 4, "overlap": "one_step", **options},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"every": 2, "num": 8},
        "checkpoint": {"every": 2, "keep_last": 4},
    }
    return parse_recipe(data, where="test")


@pytest.mark.parametrize(
    ("is_ahead", "expected"), [(False, ["1@0", "2@1", "3@2"]), (True, ["1@0", "2@0", "3@1", "4@2"])]
)
def test_which_weights_make_a_rollout(is_ahead: bool, expected: list[str]) -> None:
    made: list[str] = []
    num_updates = 0

    def generate(step: int) -> Any:
        made.append(f"{step}@{num_updates}")
        return made[-1]

    rollouts = Rollouts(generate, is_ahead=is_ahead)
    for step in (1, 2, 3):
        found = rollouts.take(step)
        assert found.trace == f"{step}@{found.weights_step}"  # type: ignore[comparison-overlap]
        assert found.staleness == (is_ahead and step > 1)
        num_updates += 1
    assert made == expected


@pytest.mark.parametrize(
    ("family", "algorithm", "correction"),
    [
        ("llada", "espo", "sequence"),
        ("sdar", "cj_grpo", "none"),
        ("llada", "mdpo", "none"),
        ("llada", "dtreerpo", "none"),
    ],
)
def test_a_resumed_run_continues_what_was_ahead(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str, algorithm: str, correction: str
) -> None:
    """Drafts and trees travel too; the rollout ahead is in the checkpoint, as its weights are nowhere else."""
    options = {"correction": correction}
    whole = recipe_of(tiny_checkpoints[family], algorithm, **options)
    train(whole, tmp_path / "whole", NullReporter())
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    train(whole, tmp_path / "parts", NullReporter(), is_resumed=True)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    weights = [row.get("correction/weight") for row in rows]
    if correction == "none":
        assert weights == [None] * 4
    else:
        assert weights[0] == pytest.approx(1.0, abs=1e-4)
        assert any(abs(weight - 1.0) > 1e-3 for weight in weights[1:])


class StoppingReporter(NullReporter):
    """Asks the run to stop in the reward phase of step `step`, between a rollout and its update."""

    def __init__(self, step: int) -> None:
        self._left = step

    def phase(self, name: str) -> None:
        self._left -= name == "reward"
        if name == "reward" and self._left == 0:
            signal.raise_signal(signal.SIGTERM)


def test_a_run_stopped_before_an_update_keeps_the_rollout_it_was_made_for(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole = recipe_of(tiny_checkpoints["llada"], "espo")
    train(whole, tmp_path / "whole", NullReporter())
    with pytest.raises(Interrupted, match="step 1 is saved"):
        train(whole, tmp_path / "parts", StoppingReporter(2))
    train(whole, tmp_path / "parts", NullReporter(), is_resumed=True)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_rollout_is_one_error(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    train(recipe_of(tiny_checkpoints["llada"], "espo", 2), tmp_path, NullReporter())
    path = list_checkpoints(tmp_path / "checkpoints")[-1] / "trainer" / "ahead.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DareError, match="the rollout ahead of the checkpoint cannot be read"):
        train(recipe_of(tiny_checkpoints["llada"], "espo", 4), tmp_path, NullReporter(), is_resumed=True)


def rollout(name: str, num: int, change: float) -> tuple[LocalEngine, Samples]:
    """An engine whose weights have changed a little since it made the rollout."""
    family = copy.deepcopy(golden_family(name))
    decode = Decode(gen_length=4, block_length=4, temperature=1.0, unmask="max_prob", batch_size=num)
    trace = denoise(family, [[3, 1, 4]] * num, decode, Key(0), list(range(num)))
    samples = Samples(
        canvas=trace.canvas,
        is_scored_BS=scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.ones(num),
        group_B=torch.zeros(num, dtype=torch.int64),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
        eos_ids=trace.eos_ids,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in family.network.parameters():
            parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
    engine = LocalEngine(recipe_of("unused", "espo"), family, num_updates=1, needs_reference=False)
    return engine, samples


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_weights_are_one_without_a_change_and_on_average(name: str) -> None:
    """The mean of an importance weight over what the old policy samples is 1, whatever the new one is."""
    engine, samples = rollout(name, 8, 0.0)
    for correction in ("sequence", "geometric"):
        assert log_weights(engine, samples, correction).abs().max() < 1e-4
    engine, samples = rollout(name, 1000, 0.05)
    weight_B = log_weights(engine, samples, "sequence").exp()
    error = float(weight_B.std()) / math.sqrt(len(weight_B))
    assert float(weight_B.std()) > 0.02
    assert float(weight_B.mean()) == pytest.approx(1.0, abs=4 * error + 2e-3)


def test_advantages_are_weighed_up_to_the_cap() -> None:
    engine, samples = rollout("llada", 40, 0.3)
    log_B = log_weights(engine, samples, "geometric").float()
    found, metrics = corrected(engine, samples, "geometric", 1.1)
    torch.testing.assert_close(found.advantage_B, log_B.exp().clamp(max=1.1))
    assert 0 < metrics["correction/truncated"] < 1
    assert 0 < metrics["correction/ess"] <= 1
    assert corrected(engine, samples, "none", 1.1) == (samples, {})


def test_what_cannot_be_corrected_is_refused() -> None:
    check(recipe_of("unused", "espo", correction="sequence"))
    assert any("nothing corrects" in line for line in check(recipe_of("unused", "espo")))
    for algorithm in ("wd1", "mdpo", "tracerl_value"):
        with pytest.raises(DareError, match="a weight would be lost"):
            check(recipe_of("unused", algorithm, correction="sequence"))
    with pytest.raises(DareError, match="changes tokens that it has committed"):
        check(recipe_of("unused", "espo", correction="sequence", decode={"remask": "rcr"}))
    with pytest.raises(DareError, match="offline training has no rollouts"):
        check(recipe_of("unused", "sft"))
