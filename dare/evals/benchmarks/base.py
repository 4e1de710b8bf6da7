"""What a benchmark is: documents with a prompt, scorers of a completion, and where its data comes from. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dare.core.errors import DareError
from dare.core.text import Message, Prompt
from dare.evals.benchmarks.rows import Origin, find_data, parse_rows

Method = Literal["generate", "likelihood"]
Style = Literal["chat", "text"]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One problem.

    question   as it is put to the model, without instructions
    answer     a reference answer in the form that shots show
    gold       what the scorer compares with, for records
    data       whatever else the scorer needs
    requests   likelihood: (context, continuation) of each choice; gold_choice is the index of the right one
    group      a subject or category whose results are also given apart
    """

    uid: str
    question: str
    answer: str
    gold: str
    data: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[tuple[str, str], ...] = ()
    gold_choice: int | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is true of one completion.

    scores     each in [0, 1]; names are the benchmark's `metrics`
    extracted  by extractor: the answer that it found, None where it found none
    problem    why the document could not be judged (a gold answer that does not parse, say); its scores are 0
    """

    scores: Mapping[str, float]
    extracted: Mapping[str, str | None]
    problem: str | None = None


class Benchmark(ABC):
    """One row of `table.BENCHMARKS`.

    metrics      names of scores; the first is the headline
    stops        text style: where a completion ends, since a model without a template goes on with another example
    version      raised whenever prompts or scoring change: part of every task hash
    shot_origin  where few-shot examples come from, if they are no part of the benchmark's own file
    """

    name: str
    summary: str
    origin: Origin
    metrics: tuple[str, ...]
    methods: tuple[Method, ...] = ("generate",)
    version: int = 1
    instruction: str = ""
    stops: tuple[str, ...] = ("\nQuestion:",)
    shot_origin: Origin | None = None

    @abstractmethod
    def document(self, row: Row, uid: str) -> Document:
        """A row of the data file as a document. Raises KeyError, ValueError or TypeError for a malformed row."""

    def data_path(self) -> Path | None:
        """The data file; None for generated problems. Raises DareError that says which file to put where."""
        return find_data(self.name, self.origin)

    def documents(self) -> list[Document]:
        """All documents, in the order of the file. Raises DareError naming the row that is malformed."""
        path = self.data_path()
        return [] if path is None else parse_rows(path, self.origin, self.document, self.name)

    def shots(self, num: int) -> list[Document]:
        """The first `num` solved examples. Raises DareError if the benchmark has no file of examples, or too few."""
        if num == 0:
            return []
        if self.shot_origin is None:
            raise DareError(f"{self.name} has no examples", where="num_shots", got=num, fix="set num_shots to 0")
        path = find_data(self.name, self.shot_origin)
        found = parse_rows(path, self.shot_origin, self.document, self.name)[:num]
        if len(found) < num:
            raise DareError(f"{self.name} has too few examples", where=str(path), got=len(found), expected=num)
        return found

    def score(self, document: Document, text: str) -> Outcome:
        """Judge one completion; never raises because of the text."""
        raise NotImplementedError(f"{self.name} is judged by likelihood only")

    def score_all(self, documents: Sequence[Document], texts: Sequence[str]) -> list[Outcome]:
        """Outcomes in order; a benchmark that can judge many at once does."""
        return [self.score(document, text) for document, text in zip(documents, texts, strict=True)]

    def prompt(self, document: Document, shots: Sequence[Document], style: Style) -> Prompt:
        """What the model is asked, with `shots` as solved examples before it."""
        if style == "chat":
            messages: list[Message] = []
            for shot in shots:
                messages += [
                    {"role": "user", "content": self.turn(shot)},
                    {"role": "assistant", "content": shot.answer},
                ]
            messages.append({"role": "user", "content": self.turn(document)})
            return Prompt(document.uid, messages=tuple(messages), answer=document.answer, task=self.name)
        solved = "".join(f"{self.plain(shot)} {shot.answer}\n\n" for shot in shots)
        return Prompt(document.uid, text=solved + self.plain(document), answer=document.answer, task=self.name)

    def turn(self, document: Document) -> str:
        """The user's message."""
        return f"{document.question}\n\n{self.instruction}".strip()

    def cut(self, text: str, style: Style) -> str:
        """The part of a completion that is judged."""
        places = [place for stop in self.stops if style == "text" and (place := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))]

    def plain(self, document: Document) -> str:
        """The same for a model without a chat template: text that the answer continues."""
        return f"Question: {document.question}\nAnswer:"

    def close(self) -> None:
        """End helper processes; here there are none."""
        return
