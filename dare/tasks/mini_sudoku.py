"""4x4 sudoku in 16 characters, row by row: `1.4...1......3..=` -> `1243341221344321`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from dare.core.text import Prompt, Reward
from dare.rewards.sudoku import is_grid, is_solved_grid
from dare.tasks.base import TaskOptions
from dare.tasks.procedural import Problem, ProceduralTask
from dare.tasks.sources import Entry

_SIDE = 4


class MiniSudokuOptions(TaskOptions):
    """How many cells are empty, and what a wrong grid is worth."""

    min_empty: int = Field(8, ge=1, le=12, description="fewest empty cells; rarely undercut to keep a puzzle unique")
    max_empty: int = Field(12, ge=1, le=12, description="most empty cells")
    cell_reward: float = Field(
        0.5, ge=0.0, lt=1.0, description="reward of a wrong grid per share of right empty cells; never counts as solved"
    )

    @model_validator(mode="after")
    def _check(self) -> MiniSudokuOptions:
        if self.min_empty > self.max_empty:
            raise ValueError(
                f"min_empty {self.min_empty} is above max_empty {self.max_empty}; swap or change one of them"
            )
        return self


class MiniSudoku(ProceduralTask[MiniSudokuOptions]):
    """Completions are the whole grid. A grid that changes a clue earns nothing.

    Parts: `format`, 16 digits from 1 to 4; `clues`, all clues are kept; `cells`, the share of empty cells filled right
    (the number that d1 reports as accuracy), 0 unless the format is right.
    """

    Config = MiniSudokuOptions
    name = "mini_sudoku"
    dataset = "mini_sudoku"
    solved_name: ClassVar[str] = "valid grid that keeps every clue"

    def parameters(self) -> dict[str, Any]:
        return self.options.model_dump(include={"min_empty", "max_empty"})

    def pose(self, entry: Entry) -> Problem:
        puzzle = _flat(entry["metadata"]["puzzle"])
        return Problem(f"{puzzle}=", _flat(entry["metadata"]["solution"]), content=puzzle)

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        metadata = prompt.meta["entry"]["metadata"]
        puzzle, solution = _flat(metadata["puzzle"]), _flat(metadata["solution"])
        text = completion.strip()
        has_format = is_grid(text, _SIDE)
        cells = list(zip(puzzle, solution, text, strict=True)) if has_format else []
        empty = [right == cell for clue, right, cell in cells if clue == "."]
        has_clues = has_format and all(cell == clue for clue, _, cell in cells if clue != ".")
        share = sum(empty) / len(empty) if empty else 0.0
        is_solved = has_clues and is_solved_grid(text, _SIDE) and self.official_score(prompt, _spaced(text)) == 1.0
        value = 1.0 if is_solved else self.options.cell_reward * share * has_clues
        return Reward(value, is_solved, {"format": float(has_format), "clues": float(has_clues), "cells": share})

    @property
    def alphabet(self) -> str:
        return "1234.="


def _flat(board: list[list[int]]) -> str:
    return "".join(str(cell) if cell else "." for row in board for cell in row)


def _spaced(grid: str) -> str:
    """The grid as reasoning-gym writes it: cells divided by spaces, rows by line ends."""
    return "\n".join(" ".join(grid[start : start + _SIDE]) for start in range(0, len(grid), _SIDE))
