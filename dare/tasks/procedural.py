"""Problems from reasoning-gym's generators, with a held-out split that training never sees."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.text import Prompt
from dare.tasks.base import Task, TaskOptions
from dare.tasks.sources import Entry, Source, open_source, source

_MAX_ATTEMPTS = 64  # draws for one problem before the problem space counts as exhausted

ProceduralOptionsT = TypeVar("ProceduralOptionsT", bound=TaskOptions)


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry as a task poses it.

    `content` is equal for problems that are the same to a solver: the key by which the splits are kept apart.
    """

    text: str
    answer: str | None
    content: Hashable


class ProceduralTask(Task[ProceduralOptionsT]):
    """Problems are drawn on demand. A draw that is held out, or that cannot be posed, is replaced by the next draw.

    The next draw has another seed and the same index, so a problem depends on no other training problem.
    """

    name: str  # first part of every uid
    dataset: str  # reasoning-gym's name

    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """Arguments of the dataset: its difficulty."""

    @abstractmethod
    def pose(self, entry: Entry) -> Problem | None:
        """The problem text and answer of an entry; None asks for another draw."""

    def prompt(self, split: str, index: int) -> Prompt:
        size = self.size(split)
        if not 0 <= index < size:
            raise DareError(f"there is no problem {self.name}/{split}/{index}", expected=f"an index in 0..{size - 1}")
        if split == "eval":
            return self._held_out[index]
        prompt, _ = self._draw("train", index, self._held_out_contents)
        return prompt

    @property
    def _held_out(self) -> list[Prompt]:
        return self._draw_held_out[0]

    @property
    def _held_out_contents(self) -> Collection[Hashable]:
        return self._draw_held_out[1]

    @cached_property
    def _draw_held_out(self) -> tuple[list[Prompt], set[Hashable]]:
        """The eval split and its contents: distinct problems, of which a smaller split is a prefix."""
        prompts: list[Prompt] = []
        contents: set[Hashable] = set()
        for index in range(self.options.eval_size):
            prompt, content = self._draw("eval", index, contents)
            prompts.append(prompt)
            contents.add(content)
        return prompts, contents

    def _draw(self, split: str, index: int, excluded: Collection[Hashable]) -> tuple[Prompt, Hashable]:
        """The first draw for (split, index) whose content is not excluded. Raises DareError if there is none."""
        for attempt in range(_MAX_ATTEMPTS):
            origin = self._source(split, attempt)
            try:
                entry: Entry = open_source(origin)[index]
            except ValueError:  # the generator gave up within its own limits
                continue
            problem = self.pose(entry)
            if problem is not None and problem.content not in excluded:
                meta = {"entry": entry, "source": origin, "index": index}
                return self.as_prompt(f"{self.name}/{split}/{index}", problem, meta), problem.content
        raise DareError(
            f"these options give too few {self.name} problems: {_MAX_ATTEMPTS} draws brought no new one",
            where=f"{self.name}/{split}/{index}",
            got=f"eval_size {self.options.eval_size}, {dict(self.parameters())}",
            fix="make the problems more varied or lower task.eval_size",
        )

    def as_prompt(self, uid: str, problem: Problem, meta: Mapping[str, Any]) -> Prompt:
        """How a problem is put to the model: as plain text."""
        return Prompt(uid=uid, text=problem.text, answer=problem.answer, task=self.name, meta=meta)

    def _source(self, split: str, attempt: int) -> Source:
        # Item i of a dataset is seeded by seed + i, so neighbouring seeds share items: hashing spreads them out.
        # 31 bits, because some generators hand seed + i on to NumPy.
        seed = self.options.eval_seed if split == "eval" else self.seed
        spread = Key(seed).fold(self.dataset, split, attempt).python_seed() >> 32
        return source(self.dataset, self.parameters(), spread, self.size(split))

    def official_score(self, prompt: Prompt, answer: str) -> float:
        """reasoning-gym's own score of an answer, in [0, 1].

        Its scorers trust their input (some evaluate it): only for text that a strict parser has accepted.
        """
        return float(open_source(prompt.meta["source"]).score_answer(answer, prompt.meta["entry"]))
