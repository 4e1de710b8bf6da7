"""Problems with a number or a formula as the answer."""

from __future__ import annotations

from typing import Literal

from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.rewards.mathematics import MathChecker, equal_numbers, flexible_answer, last_boxed, strict_answer

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class MathBenchmark(Benchmark):
    """Solved under the strict and the flexible extractor, side by side.

    gold_form   hashes: after the last "####" of column `answer`; boxed: the last \\boxed of column `solution`, or a
                column `answer`; answer: a column `answer`, or `final_answer` (a list, of which one must be met)
    is_numeric  answers are plain numbers and compared as such
    """

    metrics = ("flexible", "strict")
    instruction = _BOXED

    def __init__(
        self,
        name: str,
        summary: str,
        origin: Origin,
        gold_form: Literal["hashes", "boxed", "answer"],
        *,
        is_numeric: bool = False,
        shot_origin: Origin | None = None,
    ) -> None:
        self.name, self.summary, self.origin, self.shot_origin = name, summary, origin, shot_origin
        self.gold_form, self.is_numeric = gold_form, is_numeric
        self._checker = MathChecker()

    def document(self, row: Row, uid: str) -> Document:
        question = str(row["question"] if "question" in row else row["problem"])
        solution = str(row.get("solution") or row.get("answer"))
        if self.gold_form == "hashes" and "####" in solution:
            gold = solution.rpartition("####")[2].strip()
        elif self.gold_form == "boxed" and "answer" not in row:
            gold = last_boxed(str(row["solution"])) or ""
        else:
            found = row["final_answer"] if "final_answer" in row else row["answer"]
            gold = str(found[0] if isinstance(found, list) else found).strip().strip("$")
        if not gold:
            raise ValueError("there is no gold answer")
        worked = solution.rpartition("####")[0].strip() if "####" in solution else ""
        answer = f"{worked}\nThe answer is \\boxed{{{gold}}}.".strip()
        return Document(uid, question, answer, gold, group=str(row.get("subject") or row.get("type") or ""))

    def score(self, document: Document, text: str) -> Outcome:
        extracted = {"flexible": flexible_answer(text), "strict": strict_answer(text)}
        found = {name: self._compare(document.gold, answer) for name, answer in extracted.items()}
        problem = "the gold answer cannot be read" if "no_gold" in found.values() else None
        return Outcome({name: float(value == "equal") for name, value in found.items()}, extracted, problem)

    def _compare(self, gold: str, answer: str | None) -> str:
        return equal_numbers(gold, answer) if self.is_numeric else self._checker.compare(gold, answer)

    def close(self) -> None:
        self._checker.close()
