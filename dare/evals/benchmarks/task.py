"""A benchmark as a task: train on its file of examples, validate on its test file, with its own scorer as the reward.

    task: {name: benchmark, benchmark: gsm8k}

The same documents, prompts and scores as `dare eval --tasks gsm8k`.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from dare.core.errors import DareError, unknown_name
from dare.core.text import Prompt, Reward
from dare.evals.benchmarks.base import Document
from dare.evals.benchmarks.programs import ProgramBenchmark
from dare.evals.benchmarks.rows import find_data, parse_rows
from dare.evals.benchmarks.table import find_benchmark
from dare.sandbox.run import Sandbox
from dare.tasks.base import SPLITS, Task, TaskOptions


class BenchmarkTaskOptions(TaskOptions):
    """Which benchmark. train_size and eval_size are upper limits here; nothing is drawn, so eval_seed has no use."""

    benchmark: str = Field(description="a row of the table of benchmarks, such as gsm8k")
    style: Literal["chat", "text"] = Field("chat", description="chat: messages; text: for models without a template")
    allow_weak_sandbox: bool = Field(
        False, description="run the model's programs where the kernel refuses namespaces; they can read your files"
    )


class BenchmarkTask(Task[BenchmarkTaskOptions]):
    """`value` is the headline metric, `is_solved` that it is 1; parts: every metric, and whether an answer was found.

    Training problems that also occur in the test file are left out.
    """

    Config = BenchmarkTaskOptions
    solved_name: ClassVar[str] = "full score in the benchmark's headline metric"

    def __init__(self, options: BenchmarkTaskOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._benchmark = find_benchmark(options.benchmark)
        if isinstance(self._benchmark, ProgramBenchmark) and options.allow_weak_sandbox:
            self._benchmark.sandbox = Sandbox(is_weak_allowed=True)

    def size(self, split: str) -> int:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        return len(self._train if split == "train" else self._eval)

    def prompt(self, split: str, index: int) -> Prompt:
        size = self.size(split)
        if not 0 <= index < size:
            where = f"{self._benchmark.name}/{split}/{index}"
            raise DareError(f"there is no problem {where}", expected=f"an index in 0..{size - 1}")
        document = (self._train if split == "train" else self._eval)[index]
        prompt = self._benchmark.prompt(document, [], self.options.style)
        return dataclasses.replace(prompt, meta={"document": document})

    def reward(self, prompt: Prompt, completion: str) -> Reward:
        text = self._benchmark.cut(completion, self.options.style)
        outcome = self._benchmark.score(prompt.meta["document"], text)
        found = {f"found/{name}": float(answer is not None) for name, answer in outcome.extracted.items()}
        value = outcome.scores[self._benchmark.metrics[0]]
        return Reward(value, value == 1.0, {**outcome.scores, **found})

    def close(self) -> None:
        """End the scorer's helper processes."""
        self._benchmark.close()

    @property
    def alphabet(self) -> str:
        documents = [*self._eval, *(self._train if self._benchmark.shot_origin is not None else [])]
        prompts = [self._benchmark.prompt(document, [], "text").text or "" for document in documents]
        return "".join(sorted(set("".join([*prompts, *(document.answer for document in documents)]))))

    @cached_property
    def _eval(self) -> list[Document]:
        return self._benchmark.documents()[: self.options.eval_size]

    @cached_property
    def _train(self) -> list[Document]:
        origin, name = self._benchmark.shot_origin, self._benchmark.name
        if origin is None:
            raise DareError(f"{name} has no training problems", where="task.benchmark", fix="train on another task")
        documents = parse_rows(find_data(name, origin), origin, self._benchmark.document, name)
        held_out = {document.question for document in self._benchmark.documents()}
        return [document for document in documents if document.question not in held_out][: self.options.train_size]
