"""An environment of its own for OpenCompass, made once and used again, where it cannot be installed beside the rest.

    ENVS/opencompass-HASH/            a virtual environment; HASH is that of what is installed in it
    ENVS/opencompass-HASH/ready.json  written last: without it the folder is an unfinished try, and is made anew

ENVS is the environment variable DARE_ENVS, by default ~/.cache/dare/envs. DARE itself is linked, so it is always the
one that is running.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from dare.core.errors import DareError
from dare.core.files import write_json

_PACKAGE = "dare-dllm"
_DARE = Path(__file__).parents[1]


def environments_root() -> Path:
    """The folder of environments."""
    return Path(os.environ.get("DARE_ENVS") or Path.home() / ".cache" / "dare" / "envs")


def requirements_of(extra: str) -> list[str]:
    """What DARE and one of its extras need, as this installation says, with its torch. Raises DareError without one."""
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise DareError(f"{_PACKAGE} is not installed here", fix="pip install -e . in its source folder") from None
    if extra not in (package.metadata.get_all("Provides-Extra") or ()):
        raise DareError(
            f"{_PACKAGE} was installed from an older source, which had no extra {extra}",
            got=package.version,
            fix="pip install -e . in its source folder again",
        )
    found = [Requirement(text) for text in package.requires or ()]
    wanted = [item for item in found if item.marker is None or item.marker.evaluate({"extra": extra})]
    torch = f"=={Version(metadata.version('torch')).public}"  # a newer one may bring gigabytes for another machine
    return sorted(f"{item.name}{torch if item.name == 'torch' else item.specifier}" for item in wanted)


def find_environment(name: str, requirements: Sequence[str], root: Path | None = None) -> Path:
    """The Python of an environment with these requirements, made if it is not there; one process makes it at a time.

    Raises DareError with the end of pip's output if they cannot be installed.
    """
    root = root or environments_root()
    identity = [*requirements, sys.version, str(_DARE)]
    folder = root / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{folder.name}.lock"):
        if (folder / "ready.json").is_file():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making an environment for {name} in {folder}; this happens once", file=sys.stderr)
        venv.create(folder, with_pip=True)
        _install(python, requirements, folder)
        [packages] = (folder / "lib").glob("python3.*/site-packages")
        (packages / "dare").symlink_to(_DARE)
        write_json(folder / "ready.json", {"requirements": list(requirements), "dare": str(_DARE)})
    return python


def _install(python: Path, requirements: Sequence[str], folder: Path) -> None:
    if not requirements:
        return
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise DareError(
            "the environment cannot be made",
            where=str(folder),
            got=(done.stdout + done.stderr).strip()[-1000:],
            fix="where there is no network, install the extra yourself: pip install 'dare-dllm[opencompass]'",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
