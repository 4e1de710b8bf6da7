"""Countdown and 4x4 Sudoku with the test sets of d1 (Zhao et al. 2025), scored without partial credit.

strict: the answer ends the completion, inside <answer></answer>; flexible: the last <answer>, closed or not.
"""

from __future__ import annotations

from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.rewards import arithmetic
from dare.rewards.sudoku import is_grid, is_solved_grid
from dare.rewards.tagged import last_tagged, tagged_answer

_SIDE = 4
_FORMAT = "Reason first if you need to, then end with the answer alone inside <answer></answer>."


class CountdownBenchmark(Benchmark):
    """Solved: an expression of + - * / and brackets that uses each number once and equals the target."""

    metrics = ("flexible", "strict")
    instruction = _FORMAT

    def __init__(self, name: str, summary: str, origin: Origin) -> None:
        self.name, self.summary, self.origin = name, summary, origin

    def document(self, row: Row, uid: str) -> Document:
        numbers = [int(number) for number in str(row["input"]).split(",")]
        target = int(row["output"])
        question = (
            f"Write an arithmetic expression that uses each of the numbers {', '.join(map(str, numbers))} exactly "
            f"once, with + - * / and brackets only, and equals {target}."
        )
        return Document(uid, question, "", str(target), {"numbers": sorted(numbers), "target": target})

    def score(self, document: Document, text: str) -> Outcome:
        extracted = {"flexible": last_tagged(text), "strict": tagged_answer(text)}
        scores = {name: float(self._is_solved(document, answer)) for name, answer in extracted.items()}
        return Outcome(scores, extracted)

    def _is_solved(self, document: Document, answer: str | None) -> bool:
        expression = arithmetic.parse((answer or "").replace("\n", " "))
        if expression is None or arithmetic.has_negation(expression):
            return False
        has_numbers = sorted(arithmetic.numbers(expression)) == document.data["numbers"]
        return has_numbers and bool(arithmetic.value(expression) == document.data["target"])


class SudokuBenchmark(Benchmark):
    """Solved: a valid grid that keeps every clue. `cells` is d1's number: the share of empty cells that are right.

    A grid that changes a clue has no right cells.
    """

    metrics = ("flexible", "strict", "cells")
    instruction = "Give the whole grid as 16 digits, row by row. " + _FORMAT

    def __init__(self, name: str, summary: str, origin: Origin) -> None:
        self.name, self.summary, self.origin = name, summary, origin

    def document(self, row: Row, uid: str) -> Document:
        puzzle, solution = str(row["Puzzle"]).zfill(_SIDE**2), str(row["Solution"])
        if not is_solved_grid(solution, _SIDE) or len(puzzle) != _SIDE**2 or "0" not in puzzle:
            raise ValueError(f"puzzle {puzzle}, solution {solution}")
        if any(clue not in ("0", cell) for clue, cell in zip(puzzle, solution, strict=True)):
            raise ValueError(f"the solution {solution} changes a clue of {puzzle}")
        question = f"Solve this 4x4 Sudoku; 0 is an empty cell: {puzzle}"
        return Document(uid, question, f"<answer>{solution}</answer>", solution, {"puzzle": puzzle})

    def score(self, document: Document, text: str) -> Outcome:
        extracted = {"flexible": last_tagged(text), "strict": tagged_answer(text)}
        puzzle = document.data["puzzle"]
        grids = {name: "".join((answer or "").split()) for name, answer in extracted.items()}
        kept = {name: is_grid(grid, _SIDE) and _keeps(puzzle, grid) for name, grid in grids.items()}
        scores = {name: float(kept[name] and is_solved_grid(grid, _SIDE)) for name, grid in grids.items()}
        cells = zip(puzzle, grids["flexible"], document.gold, strict=False)
        empty = [cell == gold for clue, cell, gold in cells if clue == "0"]
        scores["cells"] = sum(empty) / len(empty) if kept["flexible"] else 0.0
        return Outcome(scores, extracted)


def _keeps(puzzle: str, grid: str) -> bool:
    return all(clue in ("0", cell) for clue, cell in zip(puzzle, grid, strict=True))
