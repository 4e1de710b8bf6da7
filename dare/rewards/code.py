"""Programs in a completion, and the verdict of the sandbox about them."""

from __future__ import annotations

import re

MAX_CODE = 50_000  # characters

_FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[0-9.]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint(", "\nassert ")


def fenced_code(text: str, entry_point: str | None = None) -> str | None:
    """The last fenced block, or the last that defines `entry_point` if one does; None without a fence."""
    blocks = [block for block in _FENCE.findall(text[-4 * MAX_CODE :]) if block.strip()]
    if not blocks:
        return None
    named = [block for block in blocks if entry_point is not None and f"def {entry_point}(" in block]
    code: str = (named or blocks)[-1]
    return code if len(code) <= MAX_CODE else None


def continued_code(prompt: str, completion: str, entry_point: str) -> str | None:
    """The program that a completion of a function's head makes; None if it is empty or too long.

    A fenced block, or text that defines the function anew, replaces the head; otherwise the text continues it, up to
    where the function ends (the stops of HumanEval, Chen et al. 2021).
    """
    fenced = fenced_code(completion, entry_point)
    body = completion if fenced is None else fenced
    if not body.strip() or len(body) > MAX_CODE:
        return None
    if f"def {entry_point}(" in body:
        # The head's imports and helpers belong to the program.
        return f"{prompt}    pass\n\n{body}\n"
    if fenced is not None and not body.startswith((" ", "\t")):
        body = "".join(f"    {line}\n" for line in body.splitlines())
    cut = min((place for stop in _STOPS if (place := body.find(stop)) >= 0), default=len(body))
    return f"{prompt}{body[:cut]}\n"


def function_name(tests: str) -> str | None:
    """The function that a list of `assert f(...) == ...` calls first; None if no assert calls one."""
    match = re.search(
        r"assert\s+(?:not\s+)?(?:\(+\s*)?(?:set|list|sorted|tuple|abs|round|math\.isclose)?\(?\s*([A-Za-z_]\w*)\s*\(",
        tests,
    )
    return match[1] if match else None
