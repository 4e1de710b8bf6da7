"""`dare bench rollout`: numbers that add up, and clear words about what cannot be measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dare.bench.reference import sample_plainly
from dare.bench.rollout import Shape, measure, needed_flops
from dare.cli import app
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.rollout.meter import Meter

SMALL = ("--width", "16", "--layers", "2", "--heads", "2", "--mlp", "24", "--vocab", "64", "--prompt-length", "6")


def bench(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", "rollout", *SMALL, *words])


@pytest.mark.parametrize(
    ("family", "options"),
    [("llada", ("cache=none",)), ("llada", ("cache=dual", "--num", "3")), ("sdar", ("--num", "2", "eos_stop=false"))],
)
def test_the_command_measures_and_compares(family: str, options: tuple[str, ...]) -> None:
    result = bench("--family", family, *options, "gen_length=8", "block_length=4", "--repeats", "1", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    assert found["is_equal"] is True
    assert found["nfe"] == 8 or family == "sdar"
    assert found["flops_per_second"] == pytest.approx(found["flops"] / found["seconds"])
    assert sum(found["seconds_by_part"].values()) == pytest.approx(found["seconds"], rel=0.2, abs=0.01)
    assert set(found["seconds_by_part"]) == {"packing", "backbone", "head", "sampling", "bookkeeping"}
    text = bench("--family", family, *options, "gen_length=8", "block_length=4", "--repeats", "1").output
    assert "tokens equal" in text
    assert "GFLOP/s" in text


def test_operations_by_hand() -> None:
    shape = Shape("llada", 16, 2, 2, None, 24, 64, 6, 1)
    decode = Decode(gen_length=4, block_length=4)
    family = shape.build(decode, torch.float32)
    meter = Meter(num_tokens=10, num_read=4, num_pairs=100, num_read_pairs=40, num_logit_rows=4)
    attention, mlp, kv = 4 * 16 * 16, 3 * 16 * 24, 2 * 16 * 16
    expected = 2 * 10 * (attention + mlp + kv) + 2 * 4 * (attention + mlp - kv)
    expected += 4 * 16 * (100 + 40) + 2 * 4 * 16 * 64
    assert needed_flops(family, meter) == expected


def test_sampling_at_random_is_not_called_equal() -> None:
    shape, decode = Shape("sdar", 16, 2, 2, None, 24, 64, 5, 2), Decode(gen_length=8, temperature=1.0)
    found = measure(shape, decode, dtype=torch.float32, num_repeats=1, has_plain=True)
    assert found.is_equal is None
    assert found.speedup is not None
    with pytest.raises(ValueError, match="no plain sampler"):
        sample_plainly(shape.build(decode, torch.float32), [[1]], Decode(unmask="margin"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--family", "lada"), "llada"),
        (("--dtype", "float16"), "float16"),
        (("--heads", "3"), "heads divide the width"),
        (("unmask=margin",), "--no-plain"),
        (("--family", "dream"), "--no-plain"),
        (("gen_lenght=4",), "gen_length"),
        (("gen_length=6", "block_length=4"), "whole blocks"),
        (("--family", "llada_moe", "--no-plain"), "mixture of experts"),
    ],
)
def test_bad_words(words: tuple[str, ...], message: str) -> None:
    result = bench(*words) if "gen_length=6" in words else bench(*words, "--repeats", "1")
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_an_unknown_family_is_an_error_from_python_too() -> None:
    with pytest.raises(DareError, match="unknown famil"):
        Shape("lada").build(Decode(), torch.float32)
