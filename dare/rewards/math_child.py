"""The child process of `MathChecker`: sympy on text that a model wrote."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from dare.rewards.child import Requests, limit_cpu

_CPU_SECONDS = 5.0  # of one answer


def _serve() -> None:
    """Two replies to a request: whether the gold answer can be read, and whether the answer equals it."""
    import math_verify  # noqa: F401 - before the hook

    logging.disable()  # math-verify warns that its own time limits are off
    _read("$1$")  # builds the parser
    requests = Requests()
    for request in requests:
        gold = _read_gold(request["gold"])
        requests.reply(bool(gold))
        if not gold:
            continue
        limit_cpu(_CPU_SECONDS)
        is_equal = _is_equal(gold, request["answer"])
        limit_cpu(0.0)
        requests.reply(is_equal)


def _read(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None)
    return found


@lru_cache(maxsize=1024)
def _read_gold(text: str) -> Any:
    limit_cpu(_CPU_SECONDS)
    found = _read(f"\\boxed{{{text}}}")
    limit_cpu(0.0)
    return found


def _is_equal(gold: Any, answer: str) -> bool:
    from math_verify import verify

    if not answer:
        return False
    try:
        return bool(verify(gold, _read(f"\\boxed{{{answer}}}"), timeout_seconds=None))
    except Exception:  # noqa: BLE001 - in the child: whatever sympy raises about a text, the text fails
        return False


if __name__ == "__main__":
    _serve()
