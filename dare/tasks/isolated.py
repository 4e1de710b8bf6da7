"""reasoning-gym's scorers in a process of their own: several of them evaluate the model's text."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from dare.core.errors import DareError
from dare.rewards.child import Child, Requests, limit_cpu
from dare.tasks.sources import Entry, Source, open_source

_CPU_SECONDS = 2.0  # of one answer


class IsolatedScorer:
    """Starts the child at the first answer, and again after an answer that ended it."""

    def __init__(self) -> None:
        self._child = Child("dare.tasks.isolated")

    def score(self, source: Source, index: int, entry: Entry, answer: str) -> float:
        """The official score of `answer` to `entry`, which is problem `index` of `source`, in [0, 1].

        0 if scoring fails. Raises DareError if the child does not start, or finds another problem there: the
        datasets that depend on Python's hash seed, say, cannot be reproduced and are of no use for training.
        """
        self._child.send({"source": asdict(source), "index": index, "problem": _identity(entry), "answer": answer})
        is_same = self._child.receive()
        if is_same is None:
            raise DareError("the scorer's process ended before it scored", where=f"reasoning-gym's {source.dataset}")
        if not is_same:
            raise DareError(f"reasoning-gym's {source.dataset} does not reproduce problem {index}")
        score = self._child.receive()
        return 0.0 if score is None else float(score)

    def close(self) -> None:
        """End the child, if there is one."""
        self._child.close()


def _serve() -> None:
    """The child. Two replies to a request: whether the problem is the same, and the score."""
    import reasoning_gym  # noqa: F401 - before the hook, because loading it sets environment variables

    requests = Requests()
    for request in requests:
        source = Source(**request["source"])
        entry = _entry(source, request["index"])
        requests.reply(_identity(entry) == request["problem"])
        limit_cpu(_CPU_SECONDS)
        score = _guarded_score(open_source(source), entry, request["answer"])
        limit_cpu(0.0)
        requests.reply(score)


@lru_cache(maxsize=1024)
def _entry(source: Source, index: int) -> Entry:
    entry: Entry = open_source(source)[index]
    return entry


def _identity(entry: Entry) -> list[str]:
    return [str(entry["question"]), str(entry["answer"])]


def _guarded_score(dataset: Any, entry: Entry, answer: str) -> float:
    try:
        score = float(dataset.score_answer(answer, entry))
    except Exception:  # noqa: BLE001 - inside the sandbox: whatever a scorer raises about a text, the text fails
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


if __name__ == "__main__":
    _serve()
