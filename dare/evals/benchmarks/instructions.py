"""IFEval: instructions that a program can verify."""

from __future__ import annotations

from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.rewards.instructions import CannotJudge, follows, loosened


class IFEval(Benchmark):
    """prompt_*: every instruction of the prompt is followed; instruction_*: the share of its instructions.

    Strict is the response as it is; loose its best variant (`loosened`). A prompt with an instruction that cannot be
    judged is reported as a problem; its other instructions are judged.
    """

    stops = ()
    metrics = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")

    def __init__(self, name: str, summary: str, origin: Origin) -> None:
        self.name, self.summary, self.origin = name, summary, origin

    def document(self, row: Row, uid: str) -> Document:
        names, arguments = list(row["instruction_id_list"]), list(row["kwargs"])
        if not names or len(names) != len(arguments):
            raise ValueError(f"{len(names)} instructions, {len(arguments)} arguments")
        data = {"instructions": list(zip(names, [dict(item or {}) for item in arguments], strict=True))}
        return Document(uid, str(row["prompt"]), "", ", ".join(names), data)

    def plain(self, document: Document) -> str:
        return document.question + "\n"

    def score(self, document: Document, text: str) -> Outcome:
        problems: list[str] = []
        strict, loose = [], []
        for name, arguments in document.data["instructions"]:
            try:
                strict.append(follows(name, arguments, text, document.question))
                variants = loosened(text)
                loose.append(any(follows(name, arguments, variant, document.question) for variant in variants))
            except CannotJudge as error:
                problems.append(str(error))
                strict, loose = strict[: len(loose)], loose
        is_whole = not problems
        scores = {
            "prompt_strict": float(is_whole and all(strict)),
            "prompt_loose": float(is_whole and all(loose)),
            "instruction_strict": sum(strict) / len(strict) if strict else 0.0,
            "instruction_loose": sum(loose) / len(loose) if loose else 0.0,
        }
        return Outcome(scores, {"response": text.strip()[:200] or None}, "; ".join(problems) or None)
