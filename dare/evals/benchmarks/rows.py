"""Where benchmark data lies, and its rows as plain data.

A benchmark's file is `DARE_DATA/NAME/SPLIT.jsonl` (or .jsonl.gz, .json, .csv, .parquet).
DARE_DATA is an environment variable; the default is ~/.cache/dare/data. Nothing is downloaded unless asked for.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dare.core.errors import DareError

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
ParsedT = TypeVar("ParsedT")


@dataclass(frozen=True, slots=True)
class Origin:
    """A public data set: its id on the Hugging Face hub, configuration and split, and the columns it must have."""

    dataset: str
    split: str
    config: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        config = f", configuration {self.config}" if self.config else ""
        return f"{self.dataset}{config}, split {self.split}"


def data_root() -> Path:
    """The folder of benchmark data."""
    return Path(os.environ.get("DARE_DATA") or Path.home() / ".cache" / "dare" / "data")


def find_data(name: str, origin: Origin) -> Path:
    """The data file of a benchmark. Raises DareError that says which file to put where."""
    folder = data_root() / name
    for ending in _ENDINGS:
        path = folder / f"{origin.split}{ending}"
        if path.is_file():
            return path
    raise DareError(
        f"the data of {name} is not here",
        where=str(folder),
        expected=f"{origin.split}.jsonl (or .json, .csv, .parquet) of the public data set {origin.description}",
        fix=f"`dare data fetch {name}` where there is a network; else put the file there, or set DARE_DATA",
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a data file. Raises DareError naming the line that is malformed."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except OSError as error:
        raise DareError("the data file cannot be read", where=str(path), got=str(error)) from None
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return [_plain(row) for row in _parquet(path)]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DareError("the data file is not UTF-8 text", where=str(path), got=str(error)) from None
    rows = {"jsonl": _json_lines, "json": _json, "csv": _csv}[kind](text, path)
    if not rows:
        raise DareError("the data file has no rows", where=str(path))
    return [_plain(row) for row in rows]


def parse_rows(
    path: Path, origin: Origin, parse: Callable[[Mapping[str, Any], str], ParsedT], name: str
) -> list[ParsedT]:
    """Every row parsed, with uid NAME/SPLIT/INDEX. Raises DareError naming the first row that is malformed."""
    parsed = []
    for index, row in enumerate(read_rows(path)):
        try:
            parsed.append(parse(row, f"{name}/{origin.split}/{index}"))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, SyntaxError) as error:
            raise DareError(
                f"this is not a row of {name}",
                where=f"{path}, row {index}",
                got=f"{type(error).__name__}: {error}; columns {', '.join(map(str, row))}",
                expected=f"columns {', '.join(origin.columns)} as in {origin.description}",
            ) from None
    return parsed


def fetch(name: str, origin: Origin) -> Path:
    """Download a data set with `datasets` and store it as JSON lines. Raises DareError without a network."""
    from datasets import load_dataset

    from dare.core.files import write_text

    try:
        dataset = load_dataset(origin.dataset, origin.config, split=origin.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DareError(
            f"cannot fetch {origin.description}",
            got=f"{type(error).__name__}: {error}",
            fix=f"download it elsewhere and put it at {data_root() / name / origin.split}.jsonl",
        ) from None
    path = data_root() / name / f"{origin.split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in dataset))
    return path


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DareError("a line is not valid JSON", where=f"{path}, line {number}", got=str(error)) from None
        if not isinstance(row, dict):
            raise DareError("a line is not a JSON object", where=f"{path}, line {number}", got=type(row).__name__)
        rows.append(row)
    return rows


def _json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DareError("the data file is not valid JSON", where=str(path), got=str(error)) from None
    rows = list(data.values()) if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DareError("the data file is no list of objects", where=str(path), got=type(data).__name__)
    return rows


def _csv(text: str, path: Path) -> list[dict[str, Any]]:
    # The columns of a puzzle are digits with leading zeros: everything stays text.
    try:
        return [dict(row) for row in csv.DictReader(io.StringIO(text), strict=True)]
    except csv.Error as error:
        raise DareError("the data file is not valid CSV", where=str(path), got=str(error)) from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DareError("the data file is not valid Parquet", where=str(path), got=str(error)) from None
    return rows


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """verl's rows (prompt messages and reward_model) as question and answer; all others as they are."""
    reward, prompt = row.get("reward_model"), row.get("prompt")
    if isinstance(reward, dict) and isinstance(prompt, list) and prompt:
        return {"question": prompt[-1]["content"], "answer": str(reward["ground_truth"])}
    return row
