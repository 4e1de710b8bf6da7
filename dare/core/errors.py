"""One kind of error for everything a user can put right, and the hint for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DareError(Exception):
    """A user's mistake or a fault of the run, said once: what, where, got, expected, fix.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.details = {"where": where, "got": got, "expected": expected, "fix": fix}
        super().__init__(what)

    def __str__(self) -> str:
        details = [f"  {label}: {value}" for label, value in self.details.items() if value is not None]
        return "\n".join([self.what, *details])

    def inside(self, place: str) -> DareError:
        """The same error with `place` (a file, say) put before where it happened."""
        where = self.details["where"]
        self.details["where"] = place if where is None else f"{place}, {where}"
        return self


class NonFiniteError(DareError):
    """A loss or gradient is NaN or infinite; the last checkpoint is untouched."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work in good order; the text says what became of it. The command exits with 128 + signal."""

    def __init__(self, signum: int, text: str = "") -> None:
        self.signum = signum
        super().__init__(text)


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """What was probably meant by `name`: of the similar ones, one that begins with it, else the most similar."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    longer = [match for match in close if match.startswith(name)]
    return next(iter(longer + close), None)


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> DareError:
    """The error for a name that is in no table: lists the closest match and all known names."""
    names = sorted(known)
    close = closest_name(name, names)
    hint = None if close is None else f"did you mean '{close}'?"
    return DareError(f"unknown {kind} '{name}'", where=where, expected=", ".join(names), fix=hint)
