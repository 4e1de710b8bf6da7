"""The rows of a recipe: every source read, its format found, each row checked; bad rows raise, or are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from dare.core.data_recipe import DataRecipe, MixedSource
from dare.core.errors import DareError
from dare.data.formats import detect_format, parse_row, rename_columns
from dare.data.rows import AnyRow
from dare.data.sources import read_records

_PEEK = 1000  # rows whose columns decide the format


@dataclass
class Tally:
    """What became of the rows that were read.

    num_read       rows, malformed ones included
    num_bad        malformed, and left out
    num_dropped    too long, and left out
    num_truncated  too long, and cut
    errors         of the first malformed rows, at most `max_errors`
    """

    num_read: int = 0
    num_bad: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    errors: list[DareError] = field(default_factory=list)
    max_errors: int = 100

    def skip(self, error: DareError) -> None:
        """Count a malformed row."""
        self.num_bad += 1
        if len(self.errors) < self.max_errors:
            self.errors.append(error)

    def warnings(self) -> list[str]:
        """One sentence for each thing that happened to rows."""
        counts = (
            (self.num_bad, "malformed and were skipped"),
            (self.num_dropped, "too long and were dropped"),
            (self.num_truncated, "too long and were cut"),
        )
        found = [f"{num} of {self.num_read} rows are {what}" for num, what in counts if num]
        if self.errors:
            found[0] += "; the first one: " + str(self.errors[0]).replace("\n ", ";")
        return found


def iterate_rows(
    data: DataRecipe, source: MixedSource, tally: Tally, *, name: str | None = None, is_skipping: bool | None = None
) -> Iterator[AnyRow]:
    """The rows of one source, in its order; uids are "NAME/INDEX", by default with the name of the file.

    is_skipping  count malformed rows in `tally` and go on; default: as `data.on_bad_row` says
    Raises DareError with file and line (or row) for the first malformed row unless they are skipped; for a missing or
    empty source.
    """
    is_skipping = data.on_bad_row == "skip" if is_skipping is None else is_skipping
    name = Path(source.path).name if name is None else name
    records = read_records(source, is_streaming=data.is_streaming)
    head = list(islice(records, _PEEK))
    if not head:
        raise DareError("the data is empty", where=source.path)
    if all(isinstance(columns, DareError) for _, columns in head) and not is_skipping:
        raise next(columns for _, columns in head if isinstance(columns, DareError))
    row_format = source.format or detect_format(head, source)
    for index, (where, columns) in enumerate(chain(head, records)):
        tally.num_read += 1
        try:
            if isinstance(columns, DareError):
                raise columns
            row = parse_row(f"{name}/{index}", where, rename_columns(columns, source, where), row_format, data)
        except DareError as error:
            if not is_skipping:
                raise
            tally.skip(error)
            continue
        yield row


def load_rows(data: DataRecipe, tally: Tally | None = None) -> list[AnyRow]:
    """All rows of a recipe with one source, in order. Raises DareError as `iterate_rows`, and if no row is left."""
    if len(data.all_sources) != 1:
        raise DareError("there are no rows to load", where="data.path", got="none")
    (source,) = data.all_sources
    return load_source(data, source, Tally() if tally is None else tally)


def load_source(data: DataRecipe, source: MixedSource, tally: Tally, name: str | None = None) -> list[AnyRow]:
    """All rows of one source, in order. Raises DareError as `iterate_rows`, and if no row is left."""
    rows = list(iterate_rows(data, source, tally, name=name))
    if not rows:
        fix = None if not tally.errors else str(tally.errors[0]).splitlines()[0]
        raise DareError("every row is malformed", where=source.path, got=f"{tally.num_bad} rows skipped", fix=fix)
    return rows
