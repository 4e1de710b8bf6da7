"""Any reasoning-gym dataset as a benchmark: generated, so there is no data file."""

from __future__ import annotations

from pathlib import Path

from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.tasks.reasoning_gym import ReasoningGym, ReasoningGymOptions

_NUM_PROBLEMS = 256


class ReasoningGymBenchmark(Benchmark):
    """The first 256 held-out problems. solved: full score; score: the dataset's own, partial credit included."""

    metrics = ("solved", "score")

    def __init__(self, dataset: str) -> None:
        self.name, self.summary = f"reasoning_gym:{dataset}", f"reasoning-gym's {dataset} ({_NUM_PROBLEMS})"
        self.origin = Origin(f"reasoning-gym {dataset}", "eval")
        options = ReasoningGymOptions(dataset=dataset, eval_size=_NUM_PROBLEMS, answer_tag="answer")
        self._task = ReasoningGym(options, seed=0)

    def data_path(self) -> Path | None:
        return None

    def documents(self) -> list[Document]:
        return [self.document({"index": index}, f"{self.name}/eval/{index}") for index in range(_NUM_PROBLEMS)]

    def document(self, row: Row, uid: str) -> Document:
        prompt = self._task.prompt("eval", row["index"])
        return Document(uid, prompt.text or "", prompt.answer or "", prompt.answer or "", {"prompt": prompt})

    def score(self, document: Document, text: str) -> Outcome:
        reward = self._task.reward(document.data["prompt"], text)
        has_answer = reward.parts["answered"] == 1.0
        return Outcome(
            {"solved": float(reward.is_solved), "score": reward.value}, {"answer": text[-200:] if has_answer else None}
        )

    def close(self) -> None:
        self._task.close()
