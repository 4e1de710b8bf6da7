"""What an offline run trains on: the sources of a recipe as text, then as one endless stream of encoded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dare.algorithms.base import RowKind
from dare.core.data_recipe import DataRecipe, MixedSource
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.data.order import Mixture, Shuffled, Stream, Windowed
from dare.data.read import Tally, iterate_rows, load_source
from dare.data.rows import AnyRow, EncodedRow, Example, LabelledRow, PreferencePair
from dare.tasks.base import Task
from dare.training.data import RowEncoder, require_rows, task_rows
from dare.training.pairs import encode_labelled, task_pairs

T = TypeVar("T")
Encode = Callable[[RowEncoder, AnyRow], list[T]]


@dataclass(frozen=True)
class TextSource:
    """One source of rows as text. `read` begins an epoch and counts what it skips."""

    weight: float
    is_in_memory: bool
    read: Callable[[Tally], Iterator[AnyRow]]


def text_sources(recipe: Recipe, task: Task[Any] | None, tally: Tally, *, has_pairs: bool = False) -> list[TextSource]:
    """The sources of a recipe: its data, or the task's problems and answers. Rows that are not streamed are read now.

    has_pairs  the task's problems come with a right and a wrong answer
    Raises DareError if there is nothing to train on, or for a source that cannot be read.
    """
    data = recipe.data or DataRecipe()
    if not data.all_sources:
        if task is None:
            raise DareError("there is nothing to train on", expected="data.path or a task", fix="add one to the recipe")
        rows: Sequence[AnyRow] = task_pairs(task) if has_pairs else task_rows(task)
        tally.num_read += len(rows)
        return [_in_memory(1.0, rows)]
    found = []
    for index, source in enumerate(data.all_sources):
        # Files of the same name in a mixture are still different rows.
        name = Path(source.path).name if len(data.all_sources) == 1 else f"{index}:{Path(source.path).name}"
        if data.is_streaming:
            found.append(_streamed(data, source, name))
        else:
            found.append(_in_memory(source.weight, load_source(data, source, tally, name)))
    return found


def row_stream(
    sources: list[TextSource], recipe: Recipe, tokenizer: Any, spec: FamilySpec, tally: Tally
) -> Stream[EncodedRow]:
    """The endless sequence of rows that the steps of a run cut into batches; `tally` counts the first epoch.

    Raises DareError naming the first row in memory that cannot be encoded, or if none is left.
    """
    return _stream(sources, recipe, RowEncoder.encode, tokenizer, spec, tally)


def pair_stream(
    sources: list[TextSource], recipe: Recipe, tokenizer: Any, spec: FamilySpec, tally: Tally
) -> Stream[PreferencePair]:
    """As `row_stream`, of preference pairs."""

    def encode(encoder: RowEncoder, row: AnyRow) -> list[PreferencePair]:
        pair = encoder.encode_pair(row)
        return [] if pair is None else [pair]

    return _stream(sources, recipe, encode, tokenizer, spec, tally)


def labelled_stream(
    sources: list[TextSource], recipe: Recipe, tokenizer: Any, spec: FamilySpec, tally: Tally
) -> Stream[LabelledRow]:
    """As `row_stream`, of good and bad completions; the sides of a pair are two of them."""
    return _stream(sources, recipe, encode_labelled, tokenizer, spec, tally)


OpenStream = Callable[[list[TextSource], Recipe, Any, FamilySpec, Tally], Stream[Example]]
STREAMS: dict[RowKind, OpenStream] = {"completions": row_stream, "pairs": pair_stream, "labelled": labelled_stream}


def _stream(
    sources: list[TextSource], recipe: Recipe, encode: Encode[T], tokenizer: Any, spec: FamilySpec, tally: Tally
) -> Stream[T]:
    data, key = recipe.data or DataRecipe(), Key(recipe.seed).fold("rows")
    streams: list[Stream[T]] = []
    for index, source in enumerate(sources):
        own = key if len(sources) == 1 else key.fold("source", index)
        opener = _Epochs(
            source, encode, lambda counted: RowEncoder(tokenizer, data, recipe.decode, spec, counted, key), tally
        )
        if source.is_in_memory:
            streams.append(Shuffled(require_rows(list(opener()), tally), own))
        else:
            streams.append(Windowed(opener, data.shuffle_window, own))
    if len(streams) == 1:
        return streams[0]
    return Mixture(streams, [source.weight for source in sources], key.fold("mixture"))


class _Epochs:
    """Opens a source again and again; only its first epoch is counted."""

    def __init__(
        self, source: TextSource, encode: Encode[T], encoder: Callable[[Tally], RowEncoder], tally: Tally
    ) -> None:
        self._source = source
        self._encode = encode
        self._encoder = encoder
        self._tally = tally

    def __call__(self) -> Iterator[Any]:
        tally, self._tally = self._tally, Tally()
        encoder = self._encoder(tally)
        return (found for row in self._source.read(tally) for found in self._encode(encoder, row))


def _in_memory(weight: float, rows: Sequence[AnyRow]) -> TextSource:
    return TextSource(weight, True, lambda tally: iter(rows))


def _streamed(data: DataRecipe, source: MixedSource, name: str) -> TextSource:
    return TextSource(source.weight, False, lambda tally: iterate_rows(data, source, tally, name=name))
