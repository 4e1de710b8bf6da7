"""Parsers of model-written text: exact on what they accept, and bounded on everything."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare.rewards import arithmetic
from dare.rewards.sudoku import is_grid, is_solved_grid

GRID = "1234341221434321"


def _value(text: str) -> Fraction | None:
    expression = arithmetic.parse(text)
    assert expression is not None
    return arithmetic.value(expression)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("8-3-2", 3),
        ("16/4/2", 2),
        ("1/3*3", 1),
        ("7/2", Fraction(7, 2)),
        ("-3 + 5*7", 32),
        ("((6))", 6),
    ],
)
def test_value_is_exact(text: str, expected: Fraction | int) -> None:
    assert _value(text) == expected


def test_division_by_zero_has_no_value() -> None:
    assert _value("1/(3-3)") is None
    assert _value("0*(1/(2-2))") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "2**3",
        "9**9**9",
        "2//3",
        "3 5",
        "3+",
        "+3",
        "(3",
        "3)",
        "()",
        "3+-5",
        "03",
        "1e9",
        "0x10",
        "1_000",
        "3.5",
        "3+5=8",
        "x",
        "__import__('os')",
        "\u0663+\u0665",  # Arabic-Indic digits
        "\uff13+\uff15",  # full-width digits
        "3\u00d75",
        "3+5\n",
        "9" * 13,
        "(" * 17 + "1" + ")" * 17,
        "1+" * 200 + "1",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    assert arithmetic.parse(text) is None


def test_parsing_time_is_bounded() -> None:
    start = time.process_time()
    for text in ("9" * 10**7, "(" * 10**7, "1+" * 10**6, "-" * 10**6, " " * 10**7):
        assert arithmetic.parse(text) is None
    assert time.process_time() - start < 0.5


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})"),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_render_keeps_value_and_numbers_and_is_stable(text: str) -> None:
    expression = arithmetic.parse(text)
    assert expression is not None
    rendered = arithmetic.render(expression)
    again = arithmetic.parse(rendered)
    assert again is not None
    assert arithmetic.value(again) == arithmetic.value(expression)
    assert sorted(arithmetic.numbers(again)) == sorted(arithmetic.numbers(expression))
    assert arithmetic.render(again) == rendered
    assert len(rendered) <= len(text)


@given(EXPRESSIONS)
def test_value_agrees_with_python_on_fractions(text: str) -> None:
    numbers = {str(number): Fraction(number) for number in range(100)}
    source = "".join(f"F[{token!r}]" if token in numbers else token for token in _tokens(text))
    try:
        expected = eval(source, {"F": numbers})
    except ZeroDivisionError:
        expected = None
    assert _value(text) == expected


def _tokens(text: str) -> list[str]:
    spaced = "".join(f" {character} " if character in "+-*/()" else character for character in text)
    return spaced.split()


@pytest.mark.parametrize(("text", "expected"), [("-3 + 5*7", "5*7-3"), ("(-3 + 5)*7/(1*1)", "(5-3)*7/(1*1)")])
def test_render_puts_positive_terms_first(text: str, expected: str) -> None:
    expression = arithmetic.parse(text)
    assert expression is not None
    assert arithmetic.has_negation(expression)
    assert arithmetic.render(expression) == expected
    again = arithmetic.parse(expected)
    assert again is not None
    assert not arithmetic.has_negation(again)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    expression = arithmetic.parse(text)
    assert expression is None or isinstance(arithmetic.render(expression), str)


def test_solved_grid() -> None:
    assert is_solved_grid(GRID, 4)
    assert is_grid("1" * 16, 4)
    assert not is_solved_grid("1" * 16, 4)
    assert not is_solved_grid("1234234134124123", 4)  # a Latin square whose boxes repeat digits


@pytest.mark.parametrize("text", ["", GRID[:-1], GRID + "1", GRID.replace("1", "5"), GRID.replace("1", "\u0661")])
def test_no_grid(text: str) -> None:
    assert not is_grid(text, 4)
    assert not is_solved_grid(text, 4)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=2, unique=True))
def test_swapping_two_different_cells_breaks_a_grid(cells: list[int]) -> None:
    swapped = list(GRID)
    first, second = cells
    swapped[first], swapped[second] = swapped[second], swapped[first]
    assert is_solved_grid("".join(swapped), 4) == (GRID[first] == GRID[second])
