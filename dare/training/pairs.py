"""Preference pairs: read or derived from a task, checked, and encoded like any other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare.core.data_recipe import DataRecipe
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.tasks.base import Task
from dare.training.data import EncodedRow, Messages, Record, Row, RowEncoder, make_row, read_records, task_rows


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two completions of one prompt as text, the better one first; both are plain text, or both messages."""

    uid: str
    where: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages

    def sides(self) -> tuple[Row, Row]:
        """Both completions as rows of their own, "UID/chosen" and "UID/rejected"."""
        chosen = Row(f"{self.uid}/chosen", self.where, self.prompt, self.chosen)
        return chosen, Row(f"{self.uid}/rejected", self.where, self.prompt, self.rejected)

    def all_text(self) -> str:
        """Every character of the row."""
        return "".join(side.all_text() for side in self.sides())


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two different completions of the same prompt as token ids."""

    uid: str
    chosen: EncodedRow
    rejected: EncodedRow


def load_pairs(data: DataRecipe) -> list[PairRow]:
    """The pairs of `data.path`: columns prompt, chosen and rejected, each text or messages.

    Raises DareError with file and line (or row) for the first malformed row, or one whose sides are equal.
    """
    records = read_records(data)
    name = Path(data.path or "").name
    return [_make_pair(f"{name}/{index}", record) for index, record in enumerate(records)]


def task_pairs(task: Task[Any]) -> list[PairRow]:
    """For every training problem its reference answer, and the next problem's answer that the task does not accept.

    Problems for which no other answer of the training set is wrong are left out. Raises DareError if none is left.
    """
    rows = task_rows(task)
    pairs = []
    for index, row in enumerate(rows):
        prompt = task.prompt("train", index)
        others = (rows[(index + step) % len(rows)].completion for step in range(1, len(rows)))
        for other in others:
            text = other if isinstance(other, str) else (other or ())[-1]["content"]
            if other != row.completion and not task.reward(prompt, text).is_solved:
                pairs.append(PairRow(row.uid, row.where, row.prompt, row.completion or "", other or ""))
                break
    if not pairs:
        raise DareError("the task has no wrong answers to compare with", where="task", fix="give data.path")
    return pairs


def encode_pairs(
    tokenizer: Any, rows: Sequence[PairRow], data: DataRecipe, decode: Decode, spec: FamilySpec
) -> list[PreferencePair]:
    """All pairs as ids, in order; with `on_too_long: drop` pairs with a side that is too long are left out.

    Raises DareError naming the first pair that cannot be encoded or whose sides become equal, or if none is left.
    """
    encoder = RowEncoder(tokenizer, data, decode, spec)
    pairs = []
    for row in rows:
        chosen, rejected = (encoder.encode(side) for side in row.sides())
        if chosen is None or rejected is None:
            continue
        if chosen.completion_ids == rejected.completion_ids:
            raise _equal_sides(row.where, "as token ids")
        pairs.append(PreferencePair(row.uid, chosen, rejected))
    if not pairs:
        raise DareError("every pair is too long", where="data.on_too_long", fix="raise max_length")
    return pairs


def _make_pair(uid: str, record: Record) -> PairRow:
    where, columns = record
    sides = []
    for column in ("chosen", "rejected"):
        if columns.get(column) is None:
            raise DareError(
                f"the row has no {column}", where=where, got=", ".join(columns), expected="chosen, rejected"
            )
        side = {"prompt": columns.get("prompt"), "completion": columns[column]}
        sides.append(make_row(uid, where, side, "prompt_completion", "last"))
    chosen, rejected = sides
    if chosen.completion == rejected.completion:
        raise _equal_sides(where, "as text")
    return PairRow(uid, where, chosen.prompt, chosen.completion or "", rejected.completion or "")


def _equal_sides(where: str, how: str) -> DareError:
    return DareError(
        "the chosen and the rejected completion are equal",
        where=where,
        got=how,
        expected="two different completions",
        fix="remove the row; it prefers nothing",
    )
