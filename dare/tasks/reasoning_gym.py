"""Any reasoning-gym dataset by name, with its own question text and its own scorer."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from dare.core.text import Prompt, Reward
from dare.tasks.base import TaskOptions
from dare.tasks.isolated import IsolatedScorer
from dare.tasks.procedural import Problem, ProceduralTask
from dare.tasks.sources import Entry

_SOLVED = 0.99  # some scorers compute 1 in floating point
_MAX_CHARS = 20_000


class ReasoningGymOptions(TaskOptions):
    """Which dataset, and how its questions and answers are framed."""

    dataset: str = Field(description="reasoning-gym's name, such as spell_backward")
    parameters: dict[str, Any] = Field({}, description="of the dataset, such as {max_word_len: 5}")
    is_chat: bool = Field(False, description="pose the question as a user message, for models with a chat template")
    answer_tag: str | None = Field(
        None,
        pattern=r"^[A-Za-z]+$",
        description="score only what is inside <TAG>...</TAG>, the last one; the question then asks for it",
    )
    extra_characters: str = Field("", description="beyond printable ASCII, for a model made from scratch")


class ReasoningGym(ProceduralTask[ReasoningGymOptions]):
    """The reward is the dataset's own score; a problem is solved at full score, never by partial credit."""

    Config = ReasoningGymOptions
    solved_name: ClassVar[str] = "full score of the dataset's own scorer"

    def __init__(self, options: ReasoningGymOptions, seed: int) -> None:
        super().__init__(options, seed)
        self.dataset = options.dataset
        self.name = f"reasoning_gym/{options.dataset}"
        self._scorer = IsolatedScorer()

    def parameters(self) -> Mapping[str, Any]:
        return self.options.parameters

    def pose(self, entry: Entry) -> Problem:
        question, answer, tag = entry["question"], entry["answer"], self.options.answer_tag
        if tag is None:
            return Problem(question, answer, content=question)
        text = f"{question}\nGive the final answer inside <{tag}></{tag}>."
        return Problem(text, None if answer is None else f"<{tag}>{answer}</{tag}>", content=question)

    def as_prompt(self, uid: str, problem: Problem, meta: Mapping[str, Any]) -> Prompt:
        if not self.options.is_chat:
            return super().as_prompt(uid, problem, meta)
        messages = ({"role": "user", "content": problem.text},)
        return Prompt(uid=uid, messages=messages, answer=problem.answer, task=self.name, meta=meta)

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        answer = self._answer(completion)
        if answer is None or len(answer) > _MAX_CHARS:
            return Reward(0.0, False, {"answered": 0.0})
        meta = prompt.meta
        score = self._scorer.score(meta["source"], meta["index"], meta["entry"], answer)
        return Reward(score, score >= _SOLVED, {"answered": 1.0})

    def close(self) -> None:
        """End the scorer's process; the next reward starts another."""
        self._scorer.close()

    def _answer(self, completion: str) -> str | None:
        """What is scored: everything, or the inside of the last pair of tags."""
        tag = self.options.answer_tag
        if tag is None:
            return completion.strip() or None
        end = completion.rfind(f"</{tag}>")
        start = completion.rfind(f"<{tag}>", 0, max(end, 0))
        return completion[start + len(tag) + 2 : end].strip() if start >= 0 else None

    @property
    def alphabet(self) -> str:
        ascii_text = string.digits + string.ascii_letters + string.punctuation + " \n"
        return "".join(sorted(set(ascii_text + self.options.extra_characters)))
