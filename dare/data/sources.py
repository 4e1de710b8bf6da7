"""Where rows come from: files, folders, data sets of the `datasets` library. Each row with its place, for errors."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dare.core.data_recipe import RowSource
from dare.core.errors import DareError, unknown_name

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_JSON = (".jsonl", ".ndjson", ".json")
_SAVED = ("state.json", "dataset_dict.json")

Columns = dict[str, Any]
Record = tuple[str, Columns | DareError]  # where it is, and its columns or why it has none


def read_records(source: RowSource, *, is_streaming: bool = False) -> Iterator[Record]:
    """The rows of a source in their order, one at a time, columns under the names that the source gives them.

    A line that is no row becomes the DareError that says so, in its place, so that a caller may skip or collect it.
    Raises DareError for a source that is missing, of no known kind or cannot be loaded.
    """
    local = Path(source.path)
    if local.is_file():
        return _read_file(local)
    if local.is_dir() and not any((local / name).is_file() for name in _SAVED):
        files = sorted(file for file in local.iterdir() if file.is_file() and is_data_file(file))
        if files:
            return (record for file in files for record in _read_file(file))
    if local.is_dir() or _HUB_ID.fullmatch(source.path):
        return _read_datasets(source, is_streaming=is_streaming)
    raise DareError("data file not found", where=source.path, fix="check data.path; it is relative to where dare runs")


def is_data_file(path: Path) -> bool:
    """Whether `read_records` can read the file, by its name."""
    return _kind(path) in (*_JSON, ".parquet")


def _kind(path: Path) -> str:
    """The suffix, without that of the compression."""
    suffixes = path.suffixes
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix


def _read_file(path: Path) -> Iterator[Record]:
    if _kind(path) in _JSON:
        return _read_lines(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise DareError("unknown kind of data file", where=str(path), expected="*.jsonl, *.jsonl.gz or *.parquet")


def _read_lines(path: Path) -> Iterator[Record]:
    is_packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parse_line(line, where)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DareError("the compressed file cannot be read", where=str(path), got=str(error)) from None


def _parse_line(line: bytes, where: str) -> Columns | DareError:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers with too many digits
        return DareError("not valid JSON", where=where, got=str(error), expected="one JSON object a line")
    if not isinstance(record, dict):
        return DareError("not a row", where=where, got=type(record).__name__, expected="one JSON object a line")
    return record


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
        yield from _numbered(path, (record for batch in batches for record in batch))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DareError("the Parquet file cannot be read", where=str(path), got=str(error)) from None


def _read_datasets(source: RowSource, *, is_streaming: bool) -> Iterator[Record]:
    import datasets

    path = source.path
    try:
        if Path(path).is_dir():
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, streaming=is_streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _not_loaded(path, error) from error
    if isinstance(loaded, dict):
        if source.split not in loaded:
            raise unknown_name("split", source.split, loaded, where=f"data.split of {path}")
        loaded = loaded[source.split]
    yield from _numbered(path, loaded)


def _not_loaded(path: str, error: Exception) -> DareError:
    """A hub id may simply be out of reach: say so, instead of only what the library says."""
    fix = None if Path(path).is_dir() else "check the id and the network; or download it and give the local path"
    return DareError(
        "the data set cannot be loaded",
        where=path,
        got=f"{type(error).__name__}: {error}",
        expected="a file, a folder of files or saved by `datasets`, or a data set on the hub",
        fix=fix,
    )


def _numbered(path: str | Path, records: Iterable[Columns]) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield f"{path}, row {number}", record
