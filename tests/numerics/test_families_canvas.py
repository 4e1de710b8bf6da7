"""How families lay out prompts and completions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.families.base import Family
from dare.families.weights import create_family

MASK, EOS, PAD, MAX_LENGTH = 11, 10, 9, 40
FEW = settings(max_examples=40, deadline=None)
some_rows = st.lists(
    st.tuples(st.lists(st.integers(0, 8), max_size=9), st.lists(st.integers(0, 8), min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


@cache
def tiny(name: str) -> Family:
    return create_family(
        name,
        vocab_size=12,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        mlp_size=8,
        max_length=MAX_LENGTH,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
        block_length=4,
        seed=0,
    )


@pytest.mark.parametrize("name", ["llada", "sdar"])
@FEW
@given(rows=some_rows, block_length=st.one_of(st.none(), st.integers(1, 6)))
def test_rows_are_left_aligned_with_blocks_on_the_grid(
    name: str, rows: list[tuple[list[int], list[int]]], block_length: int | None
) -> None:
    family = tiny(name)
    canvas = family.canvas([prompt for prompt, _ in rows], [completion for _, completion in rows], block_length)
    assert canvas.length == max(len(prompt) + len(completion) for prompt, completion in rows)
    assert canvas.attention == family.spec.attention
    length = block_length or 4
    for row, (prompt, completion) in enumerate(rows):
        total = len(prompt) + len(completion)
        assert canvas.input_BS[row].tolist() == prompt + completion + [PAD] * (canvas.length - total)
        assert canvas.is_real_BS[row].tolist() == [i < total for i in range(canvas.length)]
        assert canvas.is_completion_BS[row].tolist() == [len(prompt) <= i < total for i in range(canvas.length)]
        origin = len(prompt) if family.spec.block_grid == "completion" else 0
        expected = [(i - origin) // length for i in range(canvas.length)]
        assert canvas.block_BS[row].tolist() == expected


def test_a_masked_model_masks_exactly_the_completion() -> None:
    canvas = tiny("llada").empty_canvas([[1, 2, 3], [4]], gen_length=8)
    assert canvas.input_BS.tolist() == [[1, 2, 3, *[MASK] * 8], [4, *[MASK] * 8, PAD, PAD]]
    assert torch.equal(canvas.input_BS == MASK, canvas.is_completion_BS)


@FEW
@given(prompt_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), gen_length=st.integers(1, 9))
def test_a_block_model_fills_whole_blocks(prompt_lengths: list[int], gen_length: int) -> None:
    canvas = tiny("sdar").empty_canvas([[1] * length for length in prompt_lengths], gen_length)
    real_B, masked_B = canvas.is_real_BS.sum(-1), (canvas.input_BS == MASK).sum(-1)
    for length, real, masked in zip(prompt_lengths, real_B.tolist(), masked_B.tolist(), strict=True):
        assert real % 4 == 0
        assert real == length + masked
        assert gen_length <= masked < gen_length + 4


def test_a_completion_grid_takes_whole_blocks_only() -> None:
    with pytest.raises(DareError) as caught:
        tiny("llada").empty_canvas([[1]], gen_length=6)
    assert "whole blocks" in str(caught.value)
    assert "use gen_length 8" in str(caught.value)


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_a_row_that_is_too_long_is_named(name: str) -> None:
    with pytest.raises(DareError) as caught:
        tiny(name).canvas([[1], [1] * 20], [[2], [2] * 21])
    text = str(caught.value)
    assert "row 1" in text
    assert "prompt 20 + completion 21 = 41 tokens" in text
    assert "<= 40" in text
    assert tiny(name).canvas([[1] * 20], [[2] * 20]).length == 40


@pytest.mark.parametrize(("row", "got"), [([3, 12], "12"), ([-1, 3], "-1")])
def test_ids_outside_the_vocabulary_are_refused(row: list[int], got: str) -> None:
    with pytest.raises(DareError) as caught:
        tiny("llada").canvas([[1], row], [[2], [2]])
    assert "row 1" in str(caught.value)
    assert f"got: {got}" in str(caught.value)


def test_an_empty_row_is_refused_and_an_empty_batch_is_not() -> None:
    with pytest.raises(DareError, match="neither a prompt nor a completion"):
        tiny("llada").canvas([[]], [[]])
    assert tiny("llada").canvas([], []).input_BS.shape == (0, 0)


def test_a_block_length_is_positive() -> None:
    with pytest.raises(DareError, match="at least one position"):
        tiny("sdar").canvas([[1]], [[2]], block_length=0)


def test_rows_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 prompts, but 1 completions"):
        tiny("sdar").canvas([[1], [2]], [[3]])
