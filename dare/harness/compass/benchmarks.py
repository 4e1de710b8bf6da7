"""DARE's benchmarks as data sets and evaluators of OpenCompass, and drop-ins for evaluators that run programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from opencompass.datasets.base import BaseDataset
from opencompass.datasets.mbpp import MBPPEvaluator
from opencompass.openicl.icl_evaluator import BaseEvaluator
from opencompass.registry import ICL_EVALUATORS, LOAD_DATASET

from dare.evals.benchmarks.base import Benchmark, Document, Style
from dare.evals.benchmarks.programs import HumanEval, ProgramBenchmark
from dare.evals.benchmarks.table import find_benchmark
from dare.evals.suite import solved_examples
from dare.sandbox.limits import Program
from dare.sandbox.run import Sandbox


@LOAD_DATASET.register_module()
class BenchmarkDataset(BaseDataset):  # type: ignore[misc]
    """The documents of a benchmark of ours, as rows: prompt, gold, contexts and continuations of choices."""

    @staticmethod
    def load(
        benchmark: str, style: Style = "text", num_shots: int = 0, limit: int | None = None, method: str = "generate"
    ) -> Dataset:
        """One row per document. Raises DareError for data that is not there."""
        found = find_benchmark(benchmark)
        documents = found.documents()[:limit]
        shots = found.shots(num_shots)
        solved = solved_examples(shots)
        rows = []
        for document in documents:
            row: dict[str, Any] = {"prompt": _prompt(found, document, shots, style), "gold": document.gold}
            if method == "likelihood":
                row |= {
                    "gold": document.gold_choice,
                    "contexts": [solved + context for context, _ in document.requests],
                    "continuations": [text for _, text in document.requests],
                }
            rows.append(row)
        return Dataset.from_list(rows)


def _prompt(benchmark: Benchmark, document: Document, shots: Sequence[Document], style: Style) -> str:
    prompt = benchmark.prompt(document, shots, style)
    return json.dumps(prompt.text if prompt.text is not None else list(prompt.messages or ()))


@ICL_EVALUATORS.register_module()
class BenchmarkEvaluator(BaseEvaluator):  # type: ignore[misc]
    """The scores of the native evaluation, in per cent as OpenCompass has them, and those of each document."""

    def __init__(self, benchmark: str, limit: int | None = None, is_weak_sandbox_allowed: bool = False) -> None:
        super().__init__()
        self._benchmark, self._limit = find_benchmark(benchmark), limit
        if isinstance(self._benchmark, ProgramBenchmark):
            self._benchmark.sandbox = Sandbox(is_weak_allowed=is_weak_sandbox_allowed)

    def score(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        documents = self._benchmark.documents()[: self._limit]
        try:
            outcomes = self._benchmark.score_all(documents, predictions)
        finally:
            self._benchmark.close()
        return _summary([{"pred": text, **outcome.scores} for text, outcome in zip(predictions, outcomes, strict=True)])


@ICL_EVALUATORS.register_module()
class ChoiceEvaluator(BaseEvaluator):  # type: ignore[misc]
    """acc by log-likelihood and acc_norm by log-likelihood per byte, in per cent, for `method="likelihood"`."""

    def score(
        self, predictions: list[int], references: list[int], logps: list[list[float]], test_set: Any
    ) -> dict[str, Any]:
        details = []
        for gold, values, texts in zip(references, logps, test_set["continuations"], strict=True):
            norms = [value / len(text.encode()) for value, text in zip(values, texts, strict=True)]
            picks = {"acc": values.index(max(values)), "acc_norm": norms.index(max(norms))}
            details.append({"pred": picks["acc"], **{name: float(pick == gold) for name, pick in picks.items()}})
        return _summary(details)


@ICL_EVALUATORS.register_module()
class SandboxedHumanEval(BaseEvaluator):  # type: ignore[misc]
    """Takes the place of HumanEvalEvaluator, which runs the model's programs with the user's rights."""

    def __init__(self, k: Sequence[int] = (1,), is_weak_sandbox_allowed: bool = False) -> None:
        super().__init__()
        self._sandbox = Sandbox(is_weak_allowed=is_weak_sandbox_allowed)

    def score(self, predictions: list[str], references: list[str], test_set: Any) -> dict[str, Any]:
        benchmark = find_benchmark("humaneval")
        assert isinstance(benchmark, HumanEval)
        benchmark.sandbox = self._sandbox
        documents = [benchmark.document(row, row["task_id"]) for row in test_set]
        outcomes = benchmark.score_all(documents, predictions)
        details = [
            {"pred": text, "is_correct": outcome.scores["passed"] == 1.0, "humaneval_pass@1": outcome.scores["passed"]}
            for text, outcome in zip(predictions, outcomes, strict=True)
        ]
        return _summary(details)


@ICL_EVALUATORS.register_module()
class SandboxedMBPP(MBPPEvaluator):  # type: ignore[misc]
    """Takes the place of MBPPEvaluator: its way of finding the program, our sandbox."""

    def __init__(self, metric: str = "MBPP", is_weak_sandbox_allowed: bool = False) -> None:
        super().__init__(metric)
        self._sandbox = Sandbox(is_weak_allowed=is_weak_sandbox_allowed)

    def score(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        programs = [
            Program(self._process_answer(text), tests) for text, tests in zip(predictions, references, strict=True)
        ]
        verdicts = self._sandbox.run_all(programs)
        details = [
            {
                "pred": program.code,
                "result": verdict.status,
                "is_correct": verdict.is_passed,
                "score": float(verdict.is_passed),
            }
            for program, verdict in zip(programs, verdicts, strict=True)
        ]
        return _summary(details)


def _summary(details: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of all numbers, in per cent, and the details."""
    names = [name for name, value in details[0].items() if isinstance(value, float)]
    means = {name: 100.0 * sum(row[name] for row in details) / len(details) for name in names}
    return {**means, "details": details}
