"""Trainer against rollout: recognised from the views alone, zero for equal weights, and what differs otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dare.core.decode import Decode
from dare.core.recipe import parse_recipe
from dare.core.registry import resolve
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion.trace import scored_mask
from dare.families.base import Family
from dare.report.trace_rows import read_row
from dare.rollout.engine import denoise
from dare.rollout.trace_file import load_trace
from dare.terminal.progress import NullReporter
from dare.training.mismatch import rollout_gap
from dare.training.run import train
from tests.conftest import tiny_family

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 1], [8]]


def rollout(family: Family, temperature: float = 1.0) -> Samples:
    decode = Decode(gen_length=8, block_length=4, steps_per_block=2, unmask="max_prob", temperature=temperature)
    trace = denoise(family, PROMPTS, decode, Key(1), [1, 2, 3])
    return Samples(
        canvas=trace.canvas,
        is_scored_BS=scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.ones(3),
        group_B=torch.arange(3),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
        rollout_temperature=temperature,
        eos_ids=trace.eos_ids,
    )


def views_of(name: str, samples: Samples) -> Views:
    plugin = resolve("algorithms", name)
    views: Views = plugin(plugin.Config()).corrupt(samples, Key(2))
    return views


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("algorithm", ["cj_grpo", "agrpo"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equal_weights_agree_and_others_do_not(family_name: str, algorithm: str, temperature: float) -> None:
    family, other = tiny_family(family_name), tiny_family(family_name, seed=1)
    samples = rollout(family, temperature)
    views = views_of(algorithm, samples)
    canvas = samples.canvas.rows(views.sample_R)
    with torch.no_grad():
        same = rollout_gap(family.view_logp(views, canvas), views, samples)
        different = rollout_gap(other.view_logp(views, canvas), views, samples)
    assert same is not None
    assert different is not None
    assert same < 1e-5
    assert different > 0.05


def test_a_known_difference_is_measured(families: dict[str, Family]) -> None:
    samples = rollout(families["llada"])
    views = views_of("cj_grpo", samples)
    with torch.no_grad():
        logp_RS = families["llada"].view_logp(views, samples.canvas.rows(views.sample_R))
    assert rollout_gap(logp_RS + 0.25, views, samples) == pytest.approx(0.25, abs=1e-5)


def test_views_of_other_canvases_say_nothing(families: dict[str, Family]) -> None:
    samples = rollout(families["llada"])
    views = views_of("cj_grpo", samples)
    zeros_RS = torch.zeros(views.noisy_RS.shape)
    moved = Views(**{**vars(views), "noisy_RS": torch.where(samples.canvas.is_real_BS[views.sample_R], 5, 0)})
    assert rollout_gap(zeros_RS, moved, samples) is None
    assert rollout_gap(zeros_RS, Views(**{**vars(views), "temperature": 0.5}), samples) is None
    assert rollout_gap(zeros_RS, views, Samples(**{**vars(samples), "rollout_logp_BS": None})) is None


def test_training_keeps_traces_of_the_samples_it_shows(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = {
        "name": "traced",
        "model": {"path": str(tiny_checkpoints["sdar"])},
        "algorithm": {"name": "cj_grpo"},
        "task": {"name": "tests.even_digits:EvenDigits", "train_size": 20, "eval_size": 8},
        "decode": {"gen_length": 8, "block_length": 4, "temperature": 1.0, "unmask": "max_prob"},
        "train": {"steps": 1, "prompts_per_step": 2, "completions_per_prompt": 2},
        "evaluation": {"num": 4, "num_records": 3, "temperature": 0.7},
        "log": {"traces": 3},
    }
    train(parse_recipe(data, where="test"), tmp_path / "run", NullReporter())
    assert sorted(path.name for path in (tmp_path / "run" / "traces").iterdir()) == [
        "step-000000.safetensors",
        "step-000001.safetensors",
    ]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().split("\n")
    shown = [line for line in map(json.loads, filter(None, lines)) if line["step"] == 1]
    file = load_trace(tmp_path / "run" / "traces" / "step-000001.safetensors")
    for index, sample in enumerate([line for line in shown if line["split"] == "eval"]):
        row = read_row(file, index)
        assert row.label == sample["uid"]
        steps = [step for step, is_open in zip(row.order, row.is_completion, strict=True) if is_open]
        assert steps[: len(sample["step_map"])] == sample["step_map"]
