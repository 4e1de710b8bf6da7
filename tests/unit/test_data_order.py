"""Which row comes when: epochs, windows and mixtures as pure functions of key and place, and runs that resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.rng import Key
from dare.data.order import Mixture, Shuffled, Windowed, batch_at
from dare.data.read import Tally
from dare.families.build import family_spec
from dare.terminal.progress import NullReporter
from dare.training.feed import row_stream, text_sources
from dare.training.run import model_tokenizer, train


def windowed(num: int, window: int, seed: int = 0) -> Windowed[int]:
    return Windowed(lambda: iter(range(num)), window, Key(seed))


@given(num=st.integers(1, 30), window=st.integers(1, 12), seed=st.integers(0, 3))
def test_windows_visit_every_row_once_per_epoch_near_its_place(num: int, window: int, seed: int) -> None:
    stream = windowed(num, window, seed)
    for epoch in range(3):
        found = [stream.at(epoch * num + place) for place in range(num)]
        assert Counter(found) == Counter(range(num))
        assert all(row // window == place // window for place, row in enumerate(found))


@given(num=st.integers(1, 30), window=st.integers(1, 12), places=st.lists(st.integers(0, 99), max_size=8))
def test_a_place_has_its_row_whatever_was_asked_before(num: int, window: int, places: list[int]) -> None:
    whole, other = windowed(num, window), windowed(num, window)
    rows = [whole.at(place) for place in range(100)]
    assert [other.at(place) for place in places] == [rows[place] for place in places]


def test_windows_are_shuffled_anew_in_each_epoch_and_nothing_is_read_ahead() -> None:
    num_read = 0

    def rows() -> Iterator[int]:
        nonlocal num_read
        for row in range(50):
            num_read += 1
            yield row

    stream = Windowed(rows, 10, Key(0))
    first = [stream.at(place) for place in range(10)]
    assert num_read == 10
    assert first != sorted(first)
    assert [stream.at(50 + place) for place in range(10)] != first
    with pytest.raises(DareError, match="no row is left"):
        Windowed(lambda: iter(()), 4, Key(0)).at(0)


def mixture(weights: list[float], seed: int = 0) -> Mixture[tuple[int, int]]:
    streams = [Shuffled([(source, row) for row in range(5 + source)], Key(source)) for source in range(len(weights))]
    return Mixture(streams, weights, Key(seed))


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=4), start=st.integers(0, 9000))
def test_a_mixture_is_a_pure_function_of_the_place(weights: list[float], start: int) -> None:
    """A fresh mixture that is asked for a late place first agrees with one that has come all the way."""
    late, other = mixture(weights).source_at(start), mixture(weights)
    before = Counter(other.source_at(place)[0] for place in range(start))
    assert late == other.source_at(start)
    assert late[1] == before[late[0]]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.2, 0.5, 0.3]])
def test_sources_are_drawn_in_proportion_and_keep_their_own_epochs(weights: list[float]) -> None:
    num = 9000
    mixed = mixture(weights)
    drawn = [mixed.at(place) for place in range(num)]
    for source, weight in enumerate(weights):
        own = [row for row in drawn if row[0] == source]
        share = weight / sum(weights)
        assert abs(len(own) / num - share) < 4 * (share * (1 - share) / num) ** 0.5
        alone = Shuffled([(source, row) for row in range(5 + source)], Key(source))
        assert own == [alone.at(place) for place in range(len(own))]
    other = mixture(weights, seed=1)
    assert drawn != [other.at(place) for place in range(num)]


def test_a_mixture_needs_a_weight_for_each_stream() -> None:
    with pytest.raises(ValueError, match="2 weights"):
        Mixture([Shuffled([1], Key(0))], [1.0, 2.0], Key(0))


# Runs


def make_recipe(tmp_path: Path, data: dict[str, Any], **train: Any) -> Recipe:
    for name, digits in (("a", "123456"), ("b", "789")):
        rows = [{"prompt": f"{digit}=", "completion": digit} for digit in digits]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    create = {"family": "llada", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "max_length": 16}
    return parse_recipe(
        {
            "name": "mixed",
            "model": {"create": create},
            "algorithm": "sft",
            "data": {"eos": "one", **data},
            "train": {"steps": 4, "batch_size": 3, **train},
            "checkpoint": {"every": 2},
        },
        where="test",
    )


def sources(tmp_path: Path) -> list[dict[str, Any]]:
    return [{"path": str(tmp_path / "a.jsonl"), "weight": 2.0}, {"path": str(tmp_path / "b.jsonl")}]


def uids(recipe: Recipe, num_steps: int) -> list[list[str]]:
    tally = Tally()
    found = text_sources(recipe, None, tally)
    tokenizer = model_tokenizer(recipe, None, found)
    stream = row_stream(found, recipe, tokenizer, family_spec(recipe.model, tokenizer), tally)
    return [[row.uid for row in batch_at(stream, 3, step)] for step in range(num_steps)]


@pytest.mark.parametrize("is_streaming", [False, True])
def test_mixed_sources_reach_the_steps_of_a_run(tmp_path: Path, is_streaming: bool) -> None:
    recipe = make_recipe(tmp_path, {"sources": sources(tmp_path), "is_streaming": is_streaming, "shuffle_window": 4})
    rows = [uid for step in uids(recipe, 12) for uid in step]
    assert {uid.split("/")[0] for uid in rows} == {"0:a.jsonl", "1:b.jsonl"}
    assert uids(recipe, 12) == uids(recipe, 12)
    first = [uid for uid in rows if uid.startswith("0")][:6]
    assert len(set(first)) == 6  # a whole epoch of the first source before any row comes again


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_run_on_mixed_sources_resumes_to_the_same_bytes(tmp_path: Path, is_streaming: bool) -> None:
    data = {"sources": sources(tmp_path), "is_streaming": is_streaming, "shuffle_window": 4}
    train(make_recipe(tmp_path, data), tmp_path / "whole", NullReporter())
    train(make_recipe(tmp_path, data, steps=2), tmp_path / "parts", NullReporter())
    train(make_recipe(tmp_path, data), tmp_path / "parts", NullReporter(), is_resumed=True)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 4


def test_packing_changes_no_metric_beyond_rounding(tmp_path: Path) -> None:
    data = {"path": str(tmp_path / "a.jsonl")}
    losses = []
    for name, more in (("padded", {}), ("packed", {"pack_length": 7})):
        train(make_recipe(tmp_path, data, **more), tmp_path / name, NullReporter())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_on_raw_text_learns_it(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": "a" * 22}) + "\n")
    recipe = make_recipe(tmp_path, {"path": str(tmp_path / "raw.jsonl"), "max_length": 8}, steps=40)
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 0.01})})
    train(recipe, tmp_path / "run", NullReporter())
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["nll_masked"] for line in metrics[-10:]]
    assert sum(last) / 10 < 0.3 * max(line["nll_masked"] for line in metrics[:3])
    assert all(line["padding"] < 0.5 for line in metrics)


def test_a_run_says_what_it_left_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, {"path": str(tmp_path / "a.jsonl"), "on_bad_row": "skip"}, steps=1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{oops\n")
    said: list[str] = []

    class Listener(NullReporter):
        def message(self, text: str) -> None:
            said.append(text)

    train(recipe, tmp_path / "run", Listener())
    assert any("1 of 7 rows are malformed and were skipped" in text and "line 7" in text for text in said)
