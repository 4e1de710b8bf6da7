"""Form wins nothing: strings that try to score without solving, for every reward."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.evals.benchmarks.base import Benchmark, Document
from dare.evals.benchmarks.choice import ChoiceBenchmark
from dare.evals.benchmarks.table import find_benchmark
from dare.rewards.choice import flexible_letter, strict_letter
from dare.rewards.code import continued_code, fenced_code, function_name
from dare.rewards.instructions import VERIFIERS, CannotJudge, follows, loosened
from dare.rewards.mathematics import equal_numbers, flexible_answer, last_boxed, number, strict_answer
from dare.rewards.tagged import last_tagged, tagged_answer

HUGE = "9" * 10**6


def _document(benchmark: Benchmark, row: dict[str, object]) -> Document:
    return benchmark.document(row, f"{benchmark.name}/test/0")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is \\boxed{7}.", "7", "7"),
        ("\\boxed{1}, no, \\boxed{2}", "2", "2"),
        ("\\boxed{\\boxed{7}}", "7", "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\boxed{7", None, "7"),
        ("#### 7", "7", "7"),
        ("#### 1\n#### 2", "2", "2"),
        ("The answer is 12. Or 13.", None, "12"),
        ("The answer is $1,234.50.", None, "1,234.50"),
        ("first 3, then 4", None, "4"),
        ("\\boxed{}", None, None),
        ("\\boxed{" + "x" * 500 + "}", None, None),
        ("", None, None),
        ("no digits", None, None),
        ("\\boxed{1} " * 50 + "\\boxed{2}", "2", "2"),
    ],
)
def test_the_last_answer_counts(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_answer(text) == strict
    assert flexible_answer(text) == flexible


@pytest.mark.parametrize(
    "answer",
    ["7 or 8", "7, 8", "7^2", "7 8", "\u0667", "\uff17",
     "7**1", "7+0", "0x7", "7e0", "seven", "07.0.0", "--7", "7/1", "[7]", "7=7",
     "\u00bd", "7\u00b2", HUGE, "1_7", "nan", "inf", "", None, "__import__('os')", "7\x00", "{7}"],
)  # fmt: skip
def test_only_a_plain_number_is_a_number(answer: str | None) -> None:
    assert equal_numbers("7", answer) == "different"


@pytest.mark.parametrize("answer", ["7", "7.0", "+7", "$7", "7.", "**7**", "7%", " 7 ", "\\$7"])
def test_forms_of_a_number(answer: str) -> None:
    assert equal_numbers("7", answer) == "equal"
    assert equal_numbers("1,007", answer.replace("7", "1007")) == "equal"


def test_a_gold_answer_that_is_no_number_is_reported() -> None:
    benchmark = find_benchmark("gsm8k")
    outcome = benchmark.score(_document(benchmark, {"question": "?", "answer": "#### many"}), "\\boxed{7}")
    assert outcome.problem is not None
    assert set(outcome.scores.values()) == {0.0}


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5", "equal"),
        ("\\frac{1}{2}", "\\dfrac12", "equal"),
        ("x^2+1", "1+x^2", "equal"),
        ("\\text{Evelyn}", "Evelyn", "equal"),
        ("336^\\circ", "336", "equal"),
        ("5", "5 or 6", "different"),
        ("5", "5, 6", "different"),
        ("5", "\\{1,2,3,4,5\\}", "different"),
        ("5", "(0, 10)", "different"),
        ("5", "y", "different"),
        ("5", "__import__('os').system('touch /tmp/x')", "different"),
        ("5", "", "different"),
        ("5", None, "different"),
        ("5", "\\boxed{" * 60 + "5", "different"),
        ("2", "\\pm 2", "different"),
    ],
)
def test_mathematical_equality(gold: str, answer: str | None, expected: str, checker: object) -> None:
    assert checker.compare(gold, answer) == expected  # type: ignore[attr-defined]


@pytest.mark.slow
def test_bombs_end_and_the_checker_goes_on(checker: object) -> None:
    start = time.monotonic()
    assert checker.compare("\\pi", "9^{9^{9^{9}}}") == "different"  # type: ignore[attr-defined]
    assert time.monotonic() - start < 60
    assert checker.compare("\\pi", "\\pi") == "equal"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def checker() -> object:
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    from dare.rewards.mathematics import MathChecker

    found = MathChecker()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("B. because", "B", "B"),
        ("D. xxx", "D", "D"),
        ("**Answer: C**", "C", "C"),
        ("The answer is (B).", "B", "B"),
        ("The answer is A. No: the answer is B.", "B", "B"),
        ("so the answer is b", "B", "B"),
        ("A man walks. I think C", None, "C"),
        ("A man walks", None, None),
        ("A, B, C and D", None, "D"),
        ("The answer is (Z).", None, None),
        ("\\boxed{B}", None, "B"),
        ("\\boxed{\\text{B}}", None, "B"),
        ("the answer is Because", None, None),
        ("\u0392", None, None),  # a Greek capital Beta
        ("", None, None),
        ("A\nB\nC\nD", "A", "A"),
    ],
)
def test_letters(text: str, strict: str | None, flexible: str | None) -> None:
    assert strict_letter(text, "ABCD") == strict
    assert flexible_letter(text, "ABCD") == flexible


def test_gpqa_order_is_fixed_and_not_always_the_first() -> None:
    benchmark = find_benchmark("gpqa")
    assert isinstance(benchmark, ChoiceBenchmark)
    row = {"Question": "?", "Correct Answer": "yes", **{f"Incorrect Answer {n}": f"no{n}" for n in (1, 2, 3)}}
    golds = [benchmark.document(row, f"gpqa/train/{index}") for index in range(200)]
    assert golds[7] == benchmark.document(row, "gpqa/train/7")
    counts = [sum(document.gold_choice == place for document in golds) for place in range(4)]
    assert min(counts) > 25
    for document in golds[:5]:
        assert document.requests[document.gold_choice or 0][1] == f" {document.gold}"
        assert f"{document.gold}. yes" in document.question


SUDOKU = {"Puzzle": "0234341221430321", "Solution": "1234341221434321"}


@pytest.mark.parametrize(
    ("text", "solved", "cells"),
    [
        ("<answer>1234341221434321</answer>", 1.0, 1.0),
        ("<answer>\n1234 3412\n2143 4321\n</answer>", 1.0, 1.0),
        ("<answer>1234341221431321</answer>", 0.0, 0.5),
        ("<answer>4321341221431234</answer>", 0.0, 0.0),  # changes clues
        ("<answer>2143341212344321</answer>", 0.0, 0.0),  # a valid grid of another puzzle
        ("1234341221434321", 0.0, 0.0),
        ("<answer>12343412214343211</answer>", 0.0, 0.0),
        ("<answer>\u0661234341221434321</answer>", 0.0, 0.0),
        ("<answer>0234341221430321</answer>", 0.0, 0.0),  # the prompt again
        ("<answer>1234341221434321</answer><answer>1111111111111111</answer>", 0.0, 0.0),
        ("<answer>" + "1" * 10**6 + "</answer>", 0.0, 0.0),
    ],
)
def test_sudoku(text: str, solved: float, cells: float) -> None:
    benchmark = find_benchmark("sudoku")
    scores = benchmark.score(_document(benchmark, SUDOKU), text).scores
    assert scores == {"flexible": solved, "strict": solved, "cells": cells}


@pytest.mark.parametrize(
    ("answer", "solved"),
    [
        ("(3+7)*2", True),
        ("2*(7+3)", True),
        ("20", False),
        ("3+7+2*5", False),
        ("(3+7)*2=20", False),
        ("(3+7)*2*1", False),
        ("2**3+7", False),
        ("9**9**9", False),
        ("3+7*2+3", False),
        ("(3+7)*\u0662", False),
        ("-(-3-7)*2", False),
        ("(3+7)//0+2", False),
        ("2 3 7 20", False),
        ("__import__('os').getpid()", False),
        (HUGE, False),
        ("(" * 10**5, False),
    ],
)
def test_countdown(answer: str, solved: bool) -> None:
    benchmark = find_benchmark("countdown")
    scores = benchmark.score(
        _document(benchmark, {"input": "2,3,7", "output": "20"}), f"<answer>{answer}</answer>"
    ).scores
    assert scores == {"flexible": float(solved), "strict": float(solved)}


def test_an_answer_before_the_reasoning_is_not_strict() -> None:
    assert tagged_answer("<answer>1</answer> because") is None
    assert last_tagged("<answer>1</answer> because") == "1"
    assert tagged_answer("so <answer>1</answer>\n") == "1"
    assert tagged_answer("<answer>1</answer> <answer>2</answer>") == "2"
    assert tagged_answer("</answer>") is None
    assert last_tagged("<answer>unclosed") == "unclosed"


def test_code_is_found() -> None:
    assert fenced_code("x\n```python\nf = 1\n```\ny") == "f = 1"
    assert fenced_code("```py\nf = 1\n``` ```\ndef g(): pass\n```", "g") == "def g(): pass"
    assert fenced_code("```python\ndef f(): pass\n```\n```python\nprint(f())\n```", "f") == "def f(): pass"
    assert fenced_code("```python\ncut off = 1") == "cut off = 1"
    assert fenced_code("nothing") is None
    assert fenced_code("```python\n" + "x" * 10**6 + "\n```") is None
    head = 'def f(x):\n    """Doc."""\n'
    assert continued_code(head, "    return x\nprint(f(1))", "f") == head + "    return x\n"
    assert continued_code(head, "```python\nreturn x\n```", "f") == head + "    return x\n\n"
    assert continued_code(head, "  \n", "f") is None
    assert function_name("assert set(f((1,))) == {1}") == "f"
    assert function_name("assert not g(1)") == "g"
    assert function_name("x = 1") is None


@pytest.mark.parametrize(
    ("instruction", "arguments", "good", "bad"),
    [
        ("keywords:existence", {"keywords": ["Sun", "moon"]}, "sun and moon", "sun"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a a", "b a"),
        ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "a train", "Rain."),
        ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "z", "zZ"),
        ("language:response_language", {"language": "ru"}, "\u043f\u0440\u0438\u0432\u0435\u0442", "hello"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One 2.5"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a ***"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "it's two", "one two three"),
        ("length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"}, "a\n\n'Well, b", "well\n\nb"),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a [b]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP.S. y", "x PS y"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
        ("detectable_format:constrained_response", {}, "My answer is yes.", "yes"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* **"),
        ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
         "Section 1\na\nSection 2\nb", "Section one"),
        ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
        ("detectable_format:title", {}, "<<A>>\nb", "<< >>"),
        ("combination:two_responses", {}, "a******b", "a******a"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it: x", "x say it"),
        ("startend:end_checker", {"end_phrase": "The end."}, "x. the end.", "The end. x"),
        ("startend:quotation", {}, '"a"', '"'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
         "AB CD", "AB cd"),
        ("change_case:english_capital", {}, "ABC 1", "ABc"),
        ("change_case:english_lowercase", {}, "abc 1", "abC"),
        ("punctuation:no_comma", {}, "a b", "a, b"),
    ],
)  # fmt: skip
def test_instructions(instruction: str, arguments: dict[str, object], good: str, bad: str) -> None:
    assert follows(instruction, arguments, good)
    assert not follows(instruction, arguments, bad)
    assert not follows(instruction, arguments, " \n")


def test_every_instruction_of_the_published_list_is_tested() -> None:
    cases = {case[0] for mark in test_instructions.pytestmark for case in mark.args[1]}  # type: ignore[attr-defined]
    assert cases == set(VERIFIERS)
    assert len(VERIFIERS) == 25


def test_what_cannot_be_judged_is_reported() -> None:
    with pytest.raises(CannotJudge, match="unknown instruction"):
        follows("startend:rhyme", {}, "x")
    with pytest.raises(CannotJudge, match="shares its script"):
        follows("language:response_language", {"language": "de"}, "Guten Tag")
    with pytest.raises(CannotJudge, match="lacks the argument"):
        follows("keywords:existence", {}, "x")
    benchmark = find_benchmark("ifeval")
    names = ["punctuation:no_comma", "startend:rhyme"]
    document = _document(benchmark, {"prompt": "?", "instruction_id_list": names, "kwargs": [{}, {}]})
    outcome = benchmark.score(document, "fine")
    assert outcome.problem is not None
    assert outcome.scores["prompt_strict"] == 0.0
    assert outcome.scores["instruction_strict"] == 1.0


def test_loose_accuracy_forgives_an_opening_line() -> None:
    benchmark = find_benchmark("ifeval")
    names = ["change_case:english_lowercase"]
    document = _document(benchmark, {"prompt": "?", "instruction_id_list": names, "kwargs": [{}]})
    scores = benchmark.score(document, "Sure:\nall lower case").scores
    assert (scores["prompt_strict"], scores["prompt_loose"]) == (0.0, 1.0)
    assert "all" in loosened("Sure:\nall")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=200))
def test_extractors_take_any_text(text: str) -> None:
    for extract in (strict_answer, flexible_answer, last_boxed, fenced_code, tagged_answer, last_tagged):
        assert extract(text) is None or isinstance(extract(text), str)
    assert flexible_letter(text, "ABCD") in (None, "A", "B", "C", "D")
    assert number(text) is None or number(text) == number(f" {text} ")


def test_long_texts_take_bounded_time() -> None:
    start = time.process_time()
    for text in (
        HUGE,
        "\\boxed{" * 10**5,
        "answer is " * 10**5,
        "<answer>" * 10**5,
        "```python\n" * 10**5,
        "A " * 10**6,
        "*" * 10**5,
    ):
        for extract in (strict_answer, flexible_answer, last_boxed, fenced_code, tagged_answer, last_tagged):
            extract(text)
        flexible_letter(text, "ABCD")
        equal_numbers("7", text)
        for name in ("detectable_format:title", "detectable_format:number_highlighted_sections"):
            follows(name, {"num_highlights": 1}, text[:100_000])
    assert time.process_time() - start < 5
