"""Preferences: pairs from a task's own problems, and good and bad completions from pairs or labelled rows."""

from __future__ import annotations

from typing import Any

from dare.core.errors import DareError
from dare.core.text import Prompt
from dare.data.rows import AnyRow, LabelledRow, Messages, PairRow, Row
from dare.tasks.base import Task
from dare.training.data import RowEncoder, task_rows


def task_pairs(task: Task[Any]) -> list[PairRow]:
    """For every training problem its reference answer, and the next problem's answer that the task does not accept.

    Problems for which every answer of the training set is right are left out. Raises DareError if none is left.
    """
    rows = task_rows(task)
    pairs = []
    for index, row in enumerate(rows):
        later = (rows[(index + step) % len(rows)] for step in range(1, len(rows)))
        wrong = next((other for other in later if _is_wrong(task, task.prompt("train", index), other)), None)
        if wrong is not None:
            pairs.append(PairRow(row.uid, row.where, row.prompt, _completion(row), _completion(wrong)))
    if not pairs:
        raise DareError("the task has no wrong answers to compare with", where="task", fix="give data.path")
    return pairs


def encode_labelled(encoder: RowEncoder, row: AnyRow) -> list[LabelledRow]:
    """Both sides of a pair, or a row whose column `label` is true or false (1 or 0); fewer if rows are left out.

    Raises DareError naming a row without such a label, unless malformed rows are skipped.
    """
    if isinstance(row, PairRow):
        pair = encoder.encode_pair(row)
        return [] if pair is None else [LabelledRow(pair.chosen, True), LabelledRow(pair.rejected, False)]
    label = row.meta.get("label") if isinstance(row, Row) else None
    if label not in (True, False):
        error = DareError(
            "the row does not say whether its completion is good",
            where=row.where,
            got=f"label {label!r}",
            expected="prompt, completion and label (true or false), or prompt, chosen and rejected",
        )
        if not encoder.is_skipping:
            raise error
        encoder.tally.skip(error)
        return []
    return [LabelledRow(found, bool(label)) for found in encoder.encode(row)]


def _is_wrong(task: Task[Any], prompt: Prompt, other: Row) -> bool:
    completion = _completion(other)
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return not task.reward(prompt, text).is_solved


def _completion(row: Row) -> str | Messages:
    if row.completion is None:
        raise ValueError("rows of a task have completions")
    return row.completion
