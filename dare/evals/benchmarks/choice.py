"""Multiple choice, by generation (the letter) and by likelihood (the choice whose text is most probable)."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Literal, NamedTuple

from dare.core.rng import Key, stable_id
from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.rewards.choice import flexible_letter, strict_letter

LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """A row in common terms; `requests` only where they do not follow from the others."""

    text: str
    choices: list[str]
    gold: int
    group: str = ""
    requests: tuple[tuple[str, str], ...] = ()


class ChoiceBenchmark(Benchmark):
    """`likelihood_of`: the letters of listed choices, or the texts of choices that are not listed."""

    metrics = ("flexible", "strict")
    methods = ("generate", "likelihood")
    instruction = 'Think it through if you need to, then end with "The answer is (X).", X being the letter.'

    def __init__(
        self,
        name: str,
        summary: str,
        origin: Origin,
        read: Callable[[Row, str], Question],
        likelihood_of: Literal["letters", "texts"],
        *,
        shot_origin: Origin | None = None,
    ) -> None:
        self.name, self.summary, self.origin, self.shot_origin = name, summary, origin, shot_origin
        self._read, self._likelihood_of = read, likelihood_of

    def document(self, row: Row, uid: str) -> Document:
        question = self._read(row, uid)
        num_choices = len(question.choices)
        if not 2 <= num_choices <= len(LETTERS) or not 0 <= question.gold < num_choices:
            raise ValueError(f"gold choice {question.gold} of {num_choices}")
        listed = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices))
        text = f"{question.text}\n{listed}"
        letter = LETTERS[question.gold]
        requests = question.requests
        if not requests and self._likelihood_of == "letters":
            requests = tuple((f"Question: {text}\nAnswer:", f" {LETTERS[i]}") for i in range(num_choices))
        elif not requests:
            requests = tuple((f"Question: {question.text}\nAnswer:", f" {choice}") for choice in question.choices)
        return Document(
            uid,
            text,
            f"The answer is ({letter}).",
            letter,
            data={"letters": LETTERS[:num_choices]},
            requests=requests,
            gold_choice=question.gold,
            group=question.group,
        )

    def score(self, document: Document, text: str) -> Outcome:
        letters = document.data["letters"]
        extracted = {"flexible": flexible_letter(text, letters), "strict": strict_letter(text, letters)}
        return Outcome({name: float(letter == document.gold) for name, letter in extracted.items()}, extracted)


def _index(answer: object) -> int:
    """0-based, from a number or a letter."""
    text = str(answer).strip()
    if not text:
        raise ValueError("there is no gold choice")
    return int(text) if text.isdigit() else LETTERS.index(text.upper())


def read_mmlu(row: Row, uid: str) -> Question:
    """cais/mmlu: choices are a list, the answer an index or a letter."""
    return Question(row["question"].strip(), list(row["choices"]), _index(row["answer"]), str(row.get("subject", "")))


def read_mmlu_pro(row: Row, uid: str) -> Question:
    """TIGER-Lab/MMLU-Pro: up to ten options."""
    gold = row["answer_index"] if "answer_index" in row else row["answer"]
    return Question(row["question"].strip(), list(row["options"]), _index(gold), str(row.get("category", "")))


def read_arc(row: Row, uid: str) -> Question:
    """AI2's layout: labels are letters or numbers."""
    choices = row["choices"]
    return Question(row["question"], list(choices["text"]), list(choices["label"]).index(row["answerKey"]))


def read_hellaswag(row: Row, uid: str) -> Question:
    """Without the marks of the web page that half of the scenes were taken from, such as [header]."""
    label = str(row.get("activity_label") or "")
    context = _unmarked(f"{label}: {row['ctx']}" if label else str(row["ctx"]))
    endings = [_unmarked(str(ending)) for ending in row["endings"]]
    gold = _index(row["label"])
    question = f"What happens next?\n{context}"
    return Question(question, endings, gold, requests=tuple((context, f" {ending}") for ending in endings))


def _unmarked(text: str) -> str:
    return " ".join(re.sub(r"\[[a-z]+\]", " ", text.replace(" [title]", ". ")).split())


def read_piqa(row: Row, uid: str) -> Question:
    """Two ways of doing something."""
    return Question(row["goal"], [row["sol1"], row["sol2"]], _index(row["label"]))


def read_winogrande(row: Row, uid: str) -> Question:
    """The likelihood is that of what follows the blank, given either filling (Trinh and Le 2018, partial scoring)."""
    sentence, options = row["sentence"], [row["option1"], row["option2"]]
    before, blank, after = sentence.partition("_")
    if not blank:
        raise ValueError("the sentence has no blank")
    requests = tuple((before + option, after) for option in options)
    question = f"What belongs in the blank?\n{sentence}"
    return Question(question, options, int(row["answer"]) - 1, requests=requests)


def read_gpqa(row: Row, uid: str) -> Question:
    """The order of the choices is shuffled, keyed by the uid: in the file the right one always comes first."""
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {number}"] for number in (1, 2, 3))]
    order = Key(stable_id("gpqa", uid)).permutation(4)
    group = str(row.get("High-level domain") or "")
    return Question(row["Question"].strip(), [choices[i].strip() for i in order], order.index(0), group)
