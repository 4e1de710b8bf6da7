"""API keys come from a file or the environment: what is on a command line, every user of the machine can read."""

from __future__ import annotations

import os
from pathlib import Path

from dare.core.errors import DareError

MIN_LENGTH = 16


def read_keys(file: Path | None, variable: str | None) -> list[str]:
    """The keys of a file, one a line, and of an environment variable; empty if neither is named.

    Raises DareError for a file or variable that is not there or holds no key, and for a key that is too short.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DareError("cannot read the API keys", where=str(file), got=type(error).__name__) from None
        keys += _checked([line.strip() for line in lines if line.strip()], str(file))
    if variable is not None:
        keys += _checked([os.environ.get(variable, "").strip()], f"environment variable {variable}")
    return keys


def _checked(keys: list[str], where: str) -> list[str]:
    if not any(keys):
        raise DareError("there is no API key", where=where, expected="one key a line")
    if min(map(len, keys)) < MIN_LENGTH:
        raise DareError(
            "an API key is too short to be safe",
            where=where,
            expected=f"at least {MIN_LENGTH} characters",
            fix="python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one",
        )
    return keys
