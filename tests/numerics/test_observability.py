"""What a fine-tuning run tells of itself: losses by noise level, held-out losses, completions, arithmetic, averages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dare
from dare.cli import app
from dare.core.errors import DareError
from dare.core.files import read_lines
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.core.validation_recipe import ValidationRecipe
from dare.diffusion import corrupt
from dare.executors.compiled import compile_network
from dare.executors.local import LocalEngine
from dare.families.flops import active_parameters, training_flops
from dare.families.weights import load_family
from dare.report.curves import charts, smoothed
from dare.report.run_data import load_run
from dare.training.noise import nll_by_noise
from dare.training.throughput import utilisation
from dare.training.validation import is_out_of_patience, standing, validate
from tests.conftest import tiny_family
from tests.numerics.test_recompute import samples_of

LENGTHS = [(3, 10), (5, 5), (2, 8)]


def run_recipe(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": "watched",
        "model": {
            "create": {"family": "llada", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 24},
        },
        "algorithm": {"name": "sft"},
        "task": {"name": "chain_sum"},
        "decode": {"gen_length": 4, "block_length": 4},
        "train": {"steps": 4, "batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"num": 30, "at_start": False},
        "checkpoint": {"every": 1, "keep_last": 3},
        "validation": {"every": 1, "num_rows": 6, "num_masks": 4},
        "log": {"samples_every": 2},
    }
    for name, value in changes.items():
        data[name] = {**data.get(name, {}), **value}
    return data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    dare.train(run_recipe(validation={"is_best_kept": True}), out)
    return out


# --- loss by noise level


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_buckets_are_means_over_what_is_masked_together(name: str) -> None:
    family = tiny_family(name)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(4), num_views=5)
    logp_RS = torch.where(
        views.is_target_RS, -Key(5).uniform(torch.arange(views.is_target_RS.numel())).view_as(views.noisy_RS), 0.0
    ).float()
    expected: dict[str, list[float]] = {}
    for row in range(views.num_views):
        sample = int(views.sample_R[row])
        block_S = samples.canvas.block_BS[sample] if name == "sdar" else torch.zeros_like(samples.canvas.block_BS[0])
        for block in block_S.unique().tolist():
            is_unit_S = (block_S == block) & samples.is_scored_BS[sample]
            is_masked_S = is_unit_S & views.is_target_RS[row]
            if is_masked_S.any():
                share = int(is_masked_S.sum()) / int(is_unit_S.sum())
                low = 20 * max(0, math.ceil(share * 5 - 1e-6) - 1)
                expected.setdefault(f"nll_at/{low}-{low + 20}", []).extend((-logp_RS[row, is_masked_S]).tolist())
    found = nll_by_noise(logp_RS, views, samples)
    assert found.keys() == expected.keys()
    for bucket, values in expected.items():
        assert found[bucket].mean == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert found[bucket].count == len(values)


# --- held-out loss


def engine_of(name: str) -> LocalEngine:
    data = {"name": "t", "model": {"path": "unused"}, "algorithm": "sft", "task": "chain_sum"}
    return LocalEngine(parse_recipe(data, where="test"), tiny_family(name), num_updates=1, needs_reference=False)


@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_validation_repeats_and_does_not_depend_on_batches(name: str) -> None:
    engine = engine_of(name)
    samples = samples_of(engine.family, LENGTHS)
    whole = validate(engine, [samples], Key(7), 4)
    assert validate(engine, [samples], Key(7), 4) == whole
    alone = [_rows(samples, [row]) for row in range(len(LENGTHS))]
    parts = validate(engine, alone, Key(7), 4)
    assert parts.keys() == whole.keys()
    for field, value in whole.items():
        assert parts[field] == pytest.approx(value, rel=1e-4)


def _rows(samples: Any, rows: list[int]) -> Any:
    import dataclasses

    index = torch.tensor(rows)
    return dataclasses.replace(
        samples,
        canvas=samples.canvas.rows(index),
        is_scored_BS=samples.is_scored_BS[index],
        sample_id_B=samples.sample_id_B[index],
        advantage_B=samples.advantage_B[index],
        group_B=torch.arange(len(rows)),
    )


def test_validation_is_the_elbo_of_a_known_model() -> None:
    """A network that says nothing: every token has log-prob -log V under every mask, and so has the ELBO per token."""
    engine = engine_of("llada")
    with torch.no_grad():
        engine.family.network.head_weight.zero_()
    result = validate(engine, [samples_of(engine.family, LENGTHS)], Key(0), 3)
    assert result["nll_per_token"] == pytest.approx(math.log(engine.spec.vocab_size), rel=1e-5)
    assert result["perplexity"] == pytest.approx(engine.spec.vocab_size, rel=1e-4)
    assert result["standard_error"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("losses", "min_delta", "expected"),
    [
        ([3.0], 0.0, (0, 3.0, 0)),
        ([3.0, 2.0, 2.5, 2.1], 0.0, (1, 2.0, 2)),
        ([3.0, 2.95, 2.5], 0.1, (2, 2.5, 0)),
        ([3.0, 2.95, 2.92], 0.1, (0, 3.0, 2)),
        ([3.0, math.nan, math.nan], 0.0, (0, 3.0, 2)),
    ],
)
def test_standing(losses: list[float], min_delta: float, expected: tuple[int, float, int]) -> None:
    records = [{"step": step, "nll_per_token": loss} for step, loss in enumerate(losses)]
    found = standing(records, min_delta)
    assert found is not None
    assert (found.best_step, found.best_loss, found.num_since) == expected
    options = ValidationRecipe(every=1, patience=2, min_delta=min_delta)
    assert is_out_of_patience(records, options) == (expected[2] >= 2)
    assert not is_out_of_patience(records, None)


def test_the_best_checkpoint_is_that_of_the_lowest_loss(finished: Path) -> None:
    records = read_lines(finished / "validation.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    best = min(records, key=lambda record: record["nll_per_token"])
    state = json.loads((finished / "checkpoints" / "best" / "trainer" / "state.json").read_text())
    assert state["step"] == best["step"]
    kept = finished / "checkpoints" / f"step-{best['step']:06d}"
    assert (kept / "model.safetensors").read_bytes() == (
        finished / "checkpoints" / "best" / "model.safetensors"
    ).read_bytes()
    assert (
        dare.load(finished).family.num_parameters == dare.load(finished / "checkpoints" / "best").family.num_parameters
    )


def test_a_run_without_improvement_ends_and_stays_ended(tmp_path: Path) -> None:
    options = {"patience": 2, "min_delta": 100.0}
    recipe = run_recipe(validation=options, train={"steps": 9, "batch_size": 4}, checkpoint={"every": None})
    dare.train(recipe, tmp_path / "run")
    assert [record["step"] for record in read_lines(tmp_path / "run" / "validation.jsonl")] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    dare.train(recipe, tmp_path / "run", is_resumed=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_validates_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = run_recipe(validation={"is_best_kept": True}, train={"steps": 2, "batch_size": 4})
    dare.train(short, out)
    dare.train(run_recipe(validation={"is_best_kept": True}), out, is_resumed=True)
    for log in ("metrics", "validation"):
        assert (out / f"{log}.jsonl").read_bytes() == (finished / f"{log}.jsonl").read_bytes()
    for name in ("best", "step-000004"):
        weights = Path("checkpoints") / name / "model.safetensors"
        assert (out / weights).read_bytes() == (finished / weights).read_bytes()


def test_completions_are_logged_with_their_reference(finished: Path) -> None:
    shown = [record for record in read_lines(finished / "samples.jsonl") if record["split"] == "shown"]
    assert [record["step"] for record in shown] == [2] * 4 + [4] * 4
    assert all(record["prompt"] and record["reference"] for record in shown)
    assert [record["prompt"] for record in shown[:4]] == [record["prompt"] for record in shown[4:]]
    assert all(len(record["tokens"]) == len(record["step_map"]) for record in shown)


def test_the_best_checkpoint_can_be_exported(finished: Path, tmp_path: Path) -> None:
    best = finished / "checkpoints" / "best"
    done = CliRunner().invoke(app, ["export", str(best), "--to", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "trainer").exists()


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"validation": {"patience": 3, "every": None}}, "validation.every"),
        ({"validation": {"path": "absent.jsonl"}}, "absent.jsonl"),
        ({"validation": {"num_rows": 0}}, "num_rows"),
        ({"algorithm": {"name": "espo"}}, "no held-out loss"),
    ],
)
def test_validations_that_cannot_be(changes: dict[str, Any], hint: str, tmp_path: Path) -> None:
    with pytest.raises(DareError) as caught:
        dare.train(run_recipe(**changes), tmp_path / "run")
    assert hint in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- arithmetic


@pytest.mark.parametrize("name", ["llada", "dream", "sdar"])
def test_flops_of_a_dense_model_by_hand(name: str) -> None:
    family = tiny_family(name)
    samples = samples_of(family, LENGTHS)
    views = corrupt.bernoulli(samples, Key(0), num_views=2)
    network = family.network
    matrices = sum(p.numel() for n, p in network.named_parameters() if p.ndim == 2 and ".weight" in n)
    matrices -= 2 * network.head_weight.numel()  # embedding and head
    assert active_parameters(family) == (matrices, matrices)
    lengths = [sum(LENGTHS[int(sample)]) for sample in views.sample_R]
    clean = [sum(pair) for pair in LENGTHS]
    counts = views.is_target_RS.sum(-1).tolist()
    if name == "sdar":
        tokens = sum(lengths) + sum(clean)
        pairs = sum(length * (length + 4) / 2 for length in [*lengths, *clean])
        read_pairs = sum(num * (length + 4) / 2 for num, length in zip(counts, lengths, strict=True))
    else:
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        read_pairs = sum(num * length for num, length in zip(counts, lengths, strict=True))
    num_targets = sum(counts)
    last = network.layers[-1].named_parameters()
    spared = sum(p.numel() for n, p in last if p.ndim == 2 and "k_proj" not in n and "v_proj" not in n)
    width = network.num_heads * network.head_dim
    expected = 6 * tokens * (matrices - spared) + 12 * width * (pairs * (network.num_layers - 1) + read_pairs)
    expected += 6 * num_targets * (spared + network.head_weight.numel())
    assert training_flops(family, views, samples.canvas.rows(views.sample_R)) == pytest.approx(expected)


def test_a_mixture_counts_the_experts_that_a_token_uses() -> None:
    family = tiny_family("sdar_moe")
    total, _ = active_parameters(family)
    unused = sum(p.numel() * (1 - 2 / 8) for n, p in family.network.named_parameters() if ".experts." in n)
    dense = sum(p.numel() for n, p in family.network.named_parameters() if p.ndim >= 2)
    assert total == pytest.approx(dense - unused - 2 * family.network.head_weight.numel())


def test_utilisation() -> None:
    assert utilisation(None, 1.0, 10.0) == {}
    assert utilisation(6.0, 2.0, None) == {"tflops": 3.0}
    assert utilisation(6.0, 2.0, 10.0) == {"tflops": 3.0, "mfu": 0.3}


# --- averages


def test_an_average_is_the_mean_of_its_checkpoints(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "mean"
    words = ["average", str(finished), "--last", "2", "--out", str(out)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "step-000003" in result.stdout
    assert "step-000002" not in result.stdout
    parts = [load_family(finished / "checkpoints" / f"step-00000{step}").network.state_dict() for step in (3, 4)]
    found = load_family(out).network.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, (parts[0][name] + parts[1][name]) / 2)
    assert dare.load(out).generate(["1+2="], gen_length=4, block_length=4)


def test_averages_that_cannot_be(finished: Path, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    first = finished / "checkpoints" / "step-000004"
    for checkpoints, last, hint in (
        ([first], None, "at least two"),
        ([first, first], None, "named twice"),
        ([first, tiny_checkpoints["llada"]], None, "different models"),
        ([first, finished / "checkpoints" / "best"], 2, "--last"),
    ):
        with pytest.raises(DareError, match=hint):
            dare.average(checkpoints, tmp_path / "out", last=last)
    assert not (tmp_path / "out").exists()


# --- curves


def test_a_smoothed_curve_is_a_weighted_mean_of_what_came_before() -> None:
    values = [4.0, 1.0, 3.0, 7.0]
    found = smoothed(values, 2.0)
    for index, value in enumerate(found):
        weights = [math.exp(-(index - k) / 2.0) for k in range(index + 1)]
        assert value == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    assert smoothed([], 2.0) == []
    assert smoothed([5.0] * 9, 3.0) == pytest.approx([5.0] * 9)


def test_the_report_shows_losses_by_noise_level_and_held_out(finished: Path) -> None:
    found = {chart.title: chart for chart in charts(load_run(finished))}
    levels = found["Loss by noise level, nats per token"].series
    assert [series.label for series in levels] == sorted(
        (series.label for series in levels), key=lambda label: int(label.partition("-")[0])
    )
    assert all(label.endswith(" %") for label in (series.label for series in levels))
    (held_out,) = found["Held-out loss, nats per token"].series
    records = read_lines(finished / "validation.jsonl")
    assert held_out.values == [record["nll_per_token"] for record in records]


def test_utilisation_reaches_the_timing_log(tmp_path: Path) -> None:
    dare.train(run_recipe(log={"peak_tflops": 1.0}), tmp_path / "run")
    for metrics, timing in zip(
        read_lines(tmp_path / "run" / "metrics.jsonl"), read_lines(tmp_path / "run" / "timing.jsonl"), strict=True
    ):
        assert timing["tflops"] == pytest.approx(metrics["model_tflop"] / timing["update_s"])
        assert timing["mfu"] == pytest.approx(timing["tflops"])


# --- torch.compile


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("no C++ compiler\nfound anywhere")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(DareError, match=r"torch\.compile does not work") as caught:
        compile_network(tiny_family("llada").network)
    assert "no C++ compiler" in str(caught.value)
    assert "train.is_compiled: false" in str(caught.value)
