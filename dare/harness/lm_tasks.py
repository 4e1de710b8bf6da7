"""DARE's benchmarks as tasks of lm-eval: its requests, filters and results around our prompts and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from dare.core.errors import DareError
from dare.evals.benchmarks.base import Benchmark, Document, Style
from dare.evals.suite import Settings

_ROW = "row"  # of a row in lm-eval: the index of its document


def benchmark_task(benchmark: Benchmark, settings: Settings, style: Style, name: str) -> ConfigurableTask:
    """A benchmark as the lm-eval task `name`, with the documents, prompts, shots and scores of the native evaluation.

    `style` is chat if lm-eval is going to apply the chat template. Raises DareError for data that is not there.
    """
    documents = benchmark.documents()[: settings.limit]
    shots = benchmark.shots(settings.num_shots)
    build = _choice_config if settings.method == "likelihood" else _generation_config
    config = {
        "task": name,
        "test_split": "test",
        "num_fewshot": len(shots),
        "fewshot_delimiter": "\n\n",
        **build(benchmark, documents, shots, style),
        "metadata": {"version": benchmark.version},
    }
    return ConfigurableTask(config=config)


def _generation_config(
    benchmark: Benchmark, documents: list[Document], shots: list[Document], style: Style
) -> dict[str, Any]:
    def rows(some: Sequence[Document]) -> list[dict[str, Any]]:
        ask = benchmark.turn if style == "chat" else benchmark.plain
        return [
            {"uid": document.uid, "question": ask(document), "answer": document.answer, "gold": document.gold, _ROW: i}
            for i, document in enumerate(some)
        ]

    def scores(row: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        return dict(benchmark.score(documents[row[_ROW]], results[0]).scores)

    return {
        "output_type": "generate_until",
        "custom_dataset": partial(_dataset, rows(documents)),
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "fewshot_config": {"sampler": "first_n", "samples": rows(shots)},
        "generation_kwargs": {"until": list(benchmark.stops) if style == "text" else []},
        "process_results": scores,
        "metric_list": _metrics(benchmark.metrics),
    }


def _choice_config(
    benchmark: Benchmark, documents: list[Document], shots: list[Document], style: Style
) -> dict[str, Any]:
    """Choices differ in the continuation or, where a blank is filled (WinoGrande), in the context."""
    if style == "chat":
        raise DareError("likelihoods are those of plain text", where="task.style", got="chat", fix="set style to text")
    is_blank = any(len({context for context, _ in document.requests}) > 1 for document in documents)

    def rows(some: Sequence[Document]) -> list[dict[str, Any]]:
        return [
            {
                "uid": document.uid,
                "context": document.requests[0][0],
                "contexts": [context for context, _ in document.requests],
                "continuations": [text for _, text in document.requests],
                "gold": document.gold_choice,
                _ROW: i,
            }
            for i, document in enumerate(some)
        ]

    def scores(row: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        logps = [logp for logp, _ in results]
        norms = [logp / len(text.encode()) for logp, text in zip(logps, row["continuations"], strict=True)]
        return {
            name: float(values.index(max(values)) == row["gold"])
            for name, values in (("acc", logps), ("acc_norm", norms))
        }

    return {
        "output_type": "multiple_choice",
        "custom_dataset": partial(_dataset, rows(documents)),
        "doc_to_text": "gold" if is_blank else "context",
        "doc_to_choice": "contexts" if is_blank else "continuations",
        "doc_to_target": (lambda row: row["continuations"][0]) if is_blank else "gold",
        "target_delimiter": "",
        "fewshot_config": {"sampler": "first_n", "samples": rows(shots)},
        "process_results": scores,
        "metric_list": _metrics(("acc", "acc_norm")),
    }


def _dataset(rows: list[dict[str, Any]], version: int) -> datasets.DatasetDict:
    """lm-eval hands the task's metadata over."""
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def _metrics(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
