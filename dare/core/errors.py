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


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> DareError:
    """The error for a name that is in no table: lists the closest match and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else None
    return DareError(f"unknown {kind} '{name}'", where=where, expected=", ".join(names), fix=hint)
