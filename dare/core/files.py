"""Files that are whole or absent: written to a temporary name, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dare.core.errors import DareError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, sort_keys=False) + "\n")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to write into; it takes the place of `target` when the block succeeds.

    If the block fails or the process dies, `target` is as it was; the next `settle` of its parent clears up.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        for path in (*(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            sync_directory(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        sync_directory(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def settle(directory: Path) -> None:
    """Undo what processes that died in `whole_directory` left in `directory`.

    Half-written folders go. A folder that was moved aside and whose successor never took its place comes back.
    """
    for old in directory.glob(".*.old"):
        target = directory / old.name[1:].removesuffix(".old")
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for temporary in directory.glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, kind: str) -> Any:
    """Parsed JSON. Raises DareError if the file is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DareError(f"{kind} not found", where=str(path)) from None
    except (ValueError, RecursionError) as error:  # also numbers with too many digits, brackets too deep
        raise DareError(f"{kind} is not valid JSON", where=str(path), got=str(error)) from None


class JsonLines:
    """An append-only log of one JSON object per line, on disk line by line, that can be cut back on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. If it cannot be written as a whole (a full disk, say), nothing of it stays."""
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        start = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(start)
            raise

    def size(self) -> int:
        """Bytes on disk, after a sync."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def truncate(self, size: int) -> None:
        """Forget everything after the first `size` bytes. Raises DareError if there are fewer."""
        have = self.path.stat().st_size
        if have < size:
            raise DareError(
                "the log is shorter than its checkpoint says",
                where=str(self.path),
                got=have,
                expected=f">= {size} bytes",
            )
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines log; a last line that is still being written is ignored.

    Raises DareError for a line that is no JSON.
    """
    try:
        return [json.loads(line) for line in complete_lines(path)]
    except (ValueError, RecursionError) as error:
        raise DareError("a line of the log is not valid JSON", where=str(path), got=str(error)) from None


def complete_lines(path: Path) -> list[str]:
    """The lines of a log that hold something and have ended; none if there is no log."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    # Not splitlines(): a completion may hold other characters that end lines, which JSON leaves as they are.
    return [line for line in text[: text.rfind("\n") + 1].split("\n") if line.strip()]
