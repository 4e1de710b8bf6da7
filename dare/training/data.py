"""Offline rows: read and checked, encoded with an explicit EOS policy and loss mask, visited in a keyed order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dare.core.data_recipe import DataRecipe, LossTurns, RowFormat
from dare.core.decode import Decode
from dare.core.errors import DareError, unknown_name
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.text import Message
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_messages, encode_text, turn_end
from dare.tasks.base import Task

_ROLES = ("system", "developer", "user", "assistant", "tool")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

Messages = tuple[Message, ...]
Record = tuple[str, dict[str, Any]]  # where it is, and its columns


@dataclass(frozen=True, slots=True)
class Row:
    """One example as text. Both parts are plain text, or both are messages.

    completion  None for prompt-only rows; of messages, every assistant turn in it carries loss
    where       file and line (or row), for errors
    """

    uid: str
    where: str
    prompt: str | Messages
    completion: str | Messages | None

    def all_text(self) -> str:
        """Every character of the row."""
        parts = (self.prompt, self.completion or "")
        return "".join(
            part if isinstance(part, str) else "".join(message["content"] for message in part) for part in parts
        )


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One example as token ids; `is_scored` says which completion tokens carry loss."""

    uid: str
    prompt_ids: list[int]
    completion_ids: list[int]
    is_scored: list[bool]


# 1. Reading


def load_rows(data: DataRecipe) -> list[Row]:
    """The rows of `data.path`: JSON lines, Parquet, a folder saved by `datasets`, or a data set it can load.

    The format follows from the columns unless `data.format` names it; other columns are ignored.
    Raises DareError with file and line (or row) for the first malformed row; for a missing or empty file.
    """
    records = read_records(data)
    row_format = data.format or _detect_format(records, data.path or "")
    return [
        make_row(f"{Path(data.path or '').name}/{index}", where, record, row_format, data.loss_turns)
        for index, (where, record) in enumerate(records)
    ]


def read_records(data: DataRecipe) -> list[Record]:
    """The rows of `data.path` as they are. Raises DareError for a missing or empty file, or one that is not rows."""
    if data.path is None:
        raise DareError("there are no rows to load", where="data.path", got="none")
    records = list(_read(data.path, data.split))
    if not records:
        raise DareError("the data is empty", where=data.path)
    return records


def task_rows(task: Task[Any]) -> list[Row]:
    """The training problems of a task with their reference answers. Raises DareError if it has none."""
    rows = []
    for index in range(task.size("train")):
        prompt = task.prompt("train", index)
        if prompt.answer is None:
            raise DareError("the task has no reference answers to train on", where=prompt.uid, fix="give data.path")
        if prompt.text is not None:
            rows.append(Row(prompt.uid, prompt.uid, prompt.text, prompt.answer))
        else:
            rows.append(Row(prompt.uid, prompt.uid, prompt.messages or (), (_assistant(prompt.answer),)))
    return rows


def _read(path: str, split: str) -> Iterator[Record]:
    local = Path(path)
    if local.is_file():
        if local.suffix in (".jsonl", ".ndjson", ".json"):
            return _read_lines(local)
        if local.suffix == ".parquet":
            return _read_parquet(local)
        raise DareError("unknown kind of data file", where=path, expected="*.jsonl or *.parquet")
    if local.is_dir() or _HUB_ID.fullmatch(path):
        return _read_datasets(local, split)
    raise DareError("data file not found", where=path, fix="check data.path; it is relative to where dare runs")


def _read_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                expected = "one JSON object a line"
                raise DareError("not valid JSON", where=where, got=str(error), expected=expected) from None
            if not isinstance(record, dict):
                raise DareError("not a row", where=where, got=type(record).__name__, expected="one JSON object a line")
            yield where, record


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DareError("the Parquet file cannot be read", where=str(path), got=str(error)) from None
    yield from _numbered(path, table.to_pylist())


def _read_datasets(path: Path, split: str) -> Iterator[Record]:
    import datasets

    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DareError(
            "the data set cannot be loaded",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="a file, a folder saved by `datasets`, or a data set that it can load",
        ) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise unknown_name("split", split, loaded, where=f"data.split of {path}")
        loaded = loaded[split]
    yield from _numbered(path, loaded)


def _numbered(path: Path, records: Any) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield f"{path}, row {number}", record


# 2. Checking


def _detect_format(records: list[Record], path: str) -> RowFormat:
    """By the columns that occur anywhere, so that one row without a completion is an error and not a format."""
    columns = {column for _, record in records for column, value in record.items() if value is not None}
    if "messages" in columns:
        return "messages"
    if "prompt" in columns:
        return "prompt_completion" if "completion" in columns else "prompt_only"
    raise DareError(
        "no known columns",
        where=path,
        got=", ".join(sorted(columns)),
        expected="messages, or prompt and completion, or prompt",
        fix="rename the columns",
    )


def make_row(uid: str, where: str, record: dict[str, Any], row_format: RowFormat, loss_turns: LossTurns) -> Row:
    """The row of a record's columns. Raises DareError naming `where` if they are not as the format says."""
    if row_format == "messages":
        prompt, completion = _split_conversation(_messages(record, "messages", where), loss_turns, where)
        return Row(uid, where, prompt, completion)
    if row_format == "prompt_only":
        return Row(uid, where, _text_or_messages(record, "prompt", where), None)
    return _make_pair(uid, where, record)


def _split_conversation(messages: Messages, loss_turns: LossTurns, where: str) -> tuple[Messages, Messages]:
    """What is given, and what is learnt: from the first assistant turn with loss to the end."""
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise DareError("the last message must be the assistant's", where=where, got=roles[-1])
    start = roles.index("assistant") if loss_turns == "all" else len(messages) - 1
    if start == 0:
        raise DareError("the conversation begins with the assistant", where=where, expected="a user message first")
    return messages[:start], messages[start:]


def _make_pair(uid: str, where: str, record: dict[str, Any]) -> Row:
    prompt = _text_or_messages(record, "prompt", where)
    completion = _text_or_messages(record, "completion", where)
    if completion == "":
        raise DareError("the completion is empty", where=where, fix="remove the row or give it a completion")
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise DareError("the prompt is text, the completion messages", where=where, expected="two of a kind")
        return Row(uid, where, prompt, completion)
    turns = (_assistant(completion),) if isinstance(completion, str) else completion
    if turns[-1]["role"] != "assistant":
        raise DareError("the completion must end with the assistant", where=where, got=turns[-1]["role"])
    return Row(uid, where, prompt, turns)


def _text_or_messages(record: dict[str, Any], column: str, where: str) -> str | Messages:
    value = record.get(column)
    return value if isinstance(value, str) else _messages(record, column, where)


def _messages(record: dict[str, Any], column: str, where: str) -> Messages:
    value = record.get(column)
    expected = "text" if column != "messages" else ""
    expected += (" or " if expected else "") + 'a list of {"role": ..., "content": "text"}'
    if value is None:
        raise DareError(f"the row has no {column}", where=where, got=", ".join(record), expected=expected)
    if not isinstance(value, list) or not value:
        raise DareError(f"{column} is malformed", where=where, got=repr(value)[:80], expected=expected)
    messages = []
    for message in value:
        is_message = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_message:
            raise DareError(f"{column} has a malformed message", where=where, got=repr(message)[:80], expected=expected)
        if message["role"] not in _ROLES:
            raise unknown_name("role", message["role"], _ROLES, where=where)
        if message["role"] == "assistant" and not message["content"]:
            raise DareError(f"{column} has an empty assistant message", where=where, fix="remove the row or fill it")
        messages.append({"role": message["role"], "content": message["content"]})
    return tuple(messages)


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# 3. Encoding


class RowEncoder:
    """Rows to token ids, for one tokenizer, data recipe and family."""

    def __init__(self, tokenizer: Any, data: DataRecipe, decode: Decode, spec: FamilySpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.eos = data.eos or ("block" if spec.attention == "block_causal" else "fill")
        self.max_length = min(data.max_length or spec.max_length, spec.max_length)
        self.gen_length = data.gen_length or decode.gen_length
        self.block_length = decode.block_length or spec.block_length
        self.on_too_long = data.on_too_long
        self._special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, row: Row) -> EncodedRow | None:
        """The row as ids; None if it is too long and such rows are dropped.

        Everything after a completion carries loss. Raises DareError naming the row if it is too long, has no
        completion, or holds the mask token.
        """
        if row.completion is None:
            raise DareError("the row has only a prompt", where=row.where, expected="a completion to train on")
        if isinstance(row.prompt, str) and isinstance(row.completion, str):
            prompt_ids, completion_ids = self._encode_text(row, row.prompt), self._encode_text(row, row.completion)
            is_scored = [True] * len(completion_ids)
        else:
            prompt_ids, completion_ids, is_scored = self._encode_turns(row)
        if not completion_ids:
            raise DareError("the completion has no tokens", where=row.where)
        if self.spec.mask_id in prompt_ids or self.spec.mask_id in completion_ids:
            raise DareError("the row holds the mask token, which stands for what is unknown", where=row.where)
        tail = self._eos_tail(len(prompt_ids), completion_ids)
        completion_ids, is_scored = completion_ids + tail, is_scored + [True] * len(tail)
        room = self._room(len(prompt_ids))
        if len(completion_ids) > room:
            if self.on_too_long == "drop":
                return None
            if self.on_too_long == "error" or room <= 0 or not any(is_scored[:room]):
                raise self._too_long(row, len(prompt_ids), len(completion_ids))
        return EncodedRow(row.uid, prompt_ids, completion_ids[:room], is_scored[:room])

    def _eos_tail(self, num_prompt: int, completion_ids: list[int]) -> list[int]:
        """The EOS tokens that the policy adds; a chat template may have written the first one."""
        eos = [self.spec.eos_ids[0]]
        if self.eos == "none":
            return []
        if self.eos == "fill":
            return eos * (self.gen_length - len(completion_ids))
        tail = [] if completion_ids[-1] in self.spec.eos_ids else eos
        if self.eos == "one":
            return tail
        end = len(completion_ids) + len(tail) + (num_prompt if self.spec.block_grid == "sequence" else 0)
        return tail + eos * (-end % self.block_length)

    def _room(self, num_prompt: int) -> int:
        room = self.max_length - num_prompt
        return min(room, self.gen_length) if self.eos == "fill" else room

    def _too_long(self, row: Row, num_prompt: int, num_completion: int) -> DareError:
        limit = f"max_length {self.max_length}"
        if self.eos == "fill":
            limit += f" and gen_length {self.gen_length} (eos: fill)"
        return DareError(
            "the row is too long",
            where=row.where,
            got=f"prompt {num_prompt} + completion {num_completion} tokens",
            expected=f"within {limit}",
            fix="raise the limit, shorten the row, or set data.on_too_long to drop or truncate",
        )

    def _encode_text(self, row: Row, text: str) -> list[int]:
        try:
            return encode_text(self.tokenizer, text)
        except DareError as error:
            raise error.inside(row.where) from None

    def _encode_turns(self, row: Row) -> tuple[list[int], list[int], list[bool]]:
        """Prompt ids, completion ids and loss mask of a conversation.

        A turn is what the chat template writes between the open header of the assistant and the token that ends
        the turn; white space that follows that token is neither generated nor trained.
        """
        conversation = [*row.prompt, *(row.completion or ())]
        prompt_ids = self._render(conversation[: len(row.prompt)], is_open=True, row=row)
        ids, is_scored = prompt_ids, [False] * len(prompt_ids)
        for index in range(len(row.prompt), len(conversation)):
            if conversation[index]["role"] != "assistant":
                continue
            opened = self._render(conversation[:index], is_open=True, row=row)
            closed = self._render(conversation[: index + 1], is_open=False, row=row)
            if opened[: len(ids)] != ids or closed[: len(opened)] != opened:
                raise DareError(
                    "the chat template rewrites earlier turns, so a turn's tokens cannot be found",
                    where=row.where,
                    fix="set data.loss_turns to last, or give prompt and completion as text",
                )
            is_always_open = closed == self._render(conversation[: index + 1], is_open=True, row=row)
            end = turn_end(opened, closed, self._special_ids, is_always_open=is_always_open)
            is_scored += [False] * (len(opened) - len(ids)) + [True] * (end - len(opened))
            ids = closed[:end]
        return prompt_ids, ids[len(prompt_ids) :], is_scored[len(prompt_ids) :]

    def _render(self, messages: Any, *, is_open: bool, row: Row) -> list[int]:
        return encode_messages(self.tokenizer, messages, is_open=is_open, where=row.where)


def encode_rows(
    tokenizer: Any, rows: list[Row], data: DataRecipe, decode: Decode, spec: FamilySpec
) -> list[EncodedRow]:
    """All rows as ids, in order; with `on_too_long: drop` there may be fewer of them.

    Raises DareError naming the first row that cannot be encoded, or if none is left.
    """
    encoder = RowEncoder(tokenizer, data, decode, spec)
    encoded = [found for row in rows if (found := encoder.encode(row)) is not None]
    if not encoded:
        got = f"{len(rows)} rows dropped"
        raise DareError("every row is too long", where="data.on_too_long", got=got, fix="raise max_length")
    return encoded


def inspect_row(tokenizer: Any, encoded: EncodedRow) -> list[tuple[str, bool, bool]]:
    """(text, is_prompt, has_loss) of every token, special tokens visible."""
    prompt = [(index, True, False) for index in encoded.prompt_ids]
    completion = [(i, False, has_loss) for i, has_loss in zip(encoded.completion_ids, encoded.is_scored, strict=True)]
    return [
        (decode_text(tokenizer, [index], has_special=True), is_prompt, has_loss)
        for index, is_prompt, has_loss in prompt + completion
    ]


# 4. Order


def row_indices(num_rows: int, batch_size: int, step: int, key: Key) -> list[int]:
    """The rows of a step (0-based): a pure function, so a run resumes from its step alone.

    Steps cut one endless sequence of epochs, each a keyed permutation of all rows, into batches; a batch may
    span epochs.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(num_rows, key.fold("epoch", place // num_rows))[place % num_rows] for place in places]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, key: Key) -> list[int]:
    return key.permutation(num_rows)
