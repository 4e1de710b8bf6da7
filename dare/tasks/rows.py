"""Problems from a user's own data: prompts, and whatever columns a scorer needs to judge completions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

from pydantic import Field

from dare.core.data_recipe import Column, DataRecipe
from dare.core.errors import DareError, unknown_name
from dare.core.rng import Key
from dare.core.text import Prompt, Reward
from dare.data.read import load_rows
from dare.data.rows import Row
from dare.rewards import answers
from dare.tasks.base import Task, TaskOptions

Scorer = Callable[[Prompt, str], Reward | float]

_BY_ANSWER: dict[str, Callable[[str, str], Reward]] = {"exact": answers.exact, "number": answers.number}


class RowsOptions(TaskOptions):
    """Where the problems are and how completions are judged."""

    path: str = Field(description="rows with a prompt: JSON lines, Parquet, a folder, or a hub id")
    split: str = Field("train", description="which split of a data set that has several")
    eval_path: str | None = Field(None, description="held-out rows; default: eval_size rows of path are held out")
    eval_split: str = Field("test", description="which split of eval_path, if that has several")
    columns: dict[Column, str] = Field(
        {}, description="what the data calls prompt and answer; a.b is the field b of the column a"
    )
    is_chat: bool = Field(False, description="text prompts become a user's message")
    system: str | None = Field(None, description="system message of conversations that have none")
    scorer: str = Field(
        "exact",
        description="exact: the completion is the answer; number: its last number is the answer's; or an import path "
        "'package.module:function' of a function (prompt, completion) -> reward in [0, 1], which finds all columns in "
        "prompt.meta",
    )


class Rows(Task[RowsOptions]):
    """Rows with equal prompts count once. Training rows come in an order of the run's seed; held-out rows do not."""

    Config = RowsOptions
    name = "rows"
    solved_name: ClassVar[str] = "the scorer gives the full reward"

    def size(self, split: str) -> int:
        limit = super().size(split)
        return min(limit, len(self._rows[split]))

    def prompt(self, split: str, index: int) -> Prompt:
        size = self.size(split)
        if not 0 <= index < size:
            raise DareError(f"there is no problem rows/{split}/{index}", expected=f"an index in 0..{size - 1}")
        row = self._rows[split][index]
        text, messages = (row.prompt, None) if isinstance(row.prompt, str) else (None, row.prompt)
        return Prompt(f"rows/{split}/{index}", text, messages, _answer(row), self.name, row.meta)

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        found = self._scorer(prompt, completion)
        return found if isinstance(found, Reward) else Reward(float(found), float(found) >= 1.0)

    @property
    def alphabet(self) -> str:
        rows = [row for rows in self._rows.values() for row in rows]
        return "".join(sorted({*"".join(row.all_text() + (_answer(row) or "") for row in rows)}))

    @cached_property
    def _scorer(self) -> Scorer:
        name = self.options.scorer
        if name in _BY_ANSWER:
            judge = _BY_ANSWER[name]
            return lambda prompt, completion: judge(prompt.answer or "", completion)
        module_name, separator, attribute = name.partition(":")
        if not separator:
            raise unknown_name("scorer", name, _BY_ANSWER, where="task.scorer")
        try:
            scorer: Scorer = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise DareError(f"cannot import '{name}'", where="task.scorer", got=str(error)) from error
        return scorer

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        """The rows of both splits, checked; none of the held-out prompts is among the training prompts."""
        options = self.options
        rows = self._load(options.path, options.split)
        own = rows if options.eval_path is None else self._load(options.eval_path, options.eval_split)
        order = Key(options.eval_seed).fold("held-out rows").permutation(len(own))
        held_out = [own[index] for index in order[: options.eval_size]]
        # All of a held-out file stays unseen, also beyond eval_size.
        unseen = {_prompt_text(row) for row in (held_out if options.eval_path is None else own)}
        kept = [row for row in rows if _prompt_text(row) not in unseen]
        if not kept:
            raise DareError(
                "no row is left to train on",
                where=options.path,
                got=f"{len(rows)} different prompts, {len(held_out)} of them held out",
                fix="lower task.eval_size, or give task.eval_path",
            )
        return {"train": [kept[i] for i in Key(self.seed).fold("rows").permutation(len(kept))], "eval": held_out}

    def _load(self, path: str, split: str) -> list[Row]:
        """Rows with different prompts. Raises DareError naming the first that is malformed or lacks an answer."""
        options = self.options
        data = DataRecipe(
            path=path,
            split=split,
            format="prompt_only",
            columns=options.columns,
            is_chat=options.is_chat,
            system=options.system,
        )
        found = {_prompt_text(row): row for row in reversed(load_rows(data)) if isinstance(row, Row)}
        rows = list(found.values())[::-1]
        for row in rows:
            answer = _answer(row) or ""
            if options.scorer in _BY_ANSWER and not answer:
                fix = "give it one, map the column: task.columns: {answer: NAME}, or set task.scorer"
                raise DareError("the row has no answer", where=row.where, got=", ".join(row.meta), fix=fix)
            if options.scorer == "number" and answers.last_number(answer) is None:
                raise DareError("the answer holds no number", where=row.where, got=answer[:80])
        return rows


def _prompt_text(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else str(row.prompt)


def _answer(row: Row) -> str | None:
    answer = row.meta.get("answer")
    return None if answer is None else str(answer)
