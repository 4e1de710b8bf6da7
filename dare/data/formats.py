"""Columns to rows: which format a source has, and one row of it checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

from dare.core.data_recipe import DataRecipe, Role, RowFormat, RowSource
from dare.core.errors import DareError, unknown_name
from dare.core.text import Message
from dare.data.rows import AnyRow, Messages, PairRow, Row, TextRow, TokenRow
from dare.data.sources import Columns, Record

_ROLES: tuple[str, ...] = get_args(Role)
NO_LOSS = -100  # a label that carries no loss

# By priority: sets with preferences often carry messages too, and every row with a completion has a prompt.
_NEEDS: dict[RowFormat, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "prompt_only": ("prompt",),
    "text": ("text",),
    "tokens": ("input_ids", "labels"),
}


def rename_columns(columns: Columns, source: RowSource, where: str) -> Columns:
    """The columns under our names; "a.b" is the field b of the column a. Raises DareError for one that is not there."""
    if not source.columns:
        return columns
    renamed = {name: value for name, value in columns.items() if name not in source.columns.values()}
    for ours, theirs in source.columns.items():
        renamed[ours] = _column(columns, theirs, where)
    return renamed


def _column(columns: Columns, name: str, where: str) -> Any:
    """The column, or for "a.b" the field b of the column a."""
    if name in columns:
        return columns[name]
    outer, _, inner = name.partition(".")
    value = columns.get(outer)
    if not inner or not isinstance(value, dict):
        raise unknown_name("column", name, columns, where=where)
    return _column(value, inner, where)


def detect_format(records: Iterable[Record], source: RowSource) -> RowFormat:
    """The format that at least half of the rows have, else the most frequent one: a few odd rows are errors.

    Raises DareError if no row has the columns of any format.
    """
    rows = [
        {name for name, value in _renamed(columns, source, where).items() if value is not None}
        for where, columns in records
        if not isinstance(columns, DareError)
    ]
    counts = {row_format: sum(row.issuperset(needed) for row in rows) for row_format, needed in _NEEDS.items()}
    usual = [row_format for row_format, count in counts.items() if count and 2 * count >= len(rows)]
    if any(counts.values()):
        return usual[0] if usual else max(counts, key=lambda row_format: counts[row_format])
    found = {name for row in rows for name in row}
    raise DareError(
        "no known columns",
        where=source.path,
        got=", ".join(sorted(found)) or "none",
        expected="; ".join(" and ".join(needed) for needed in _NEEDS.values()),
        fix="say what they are called here, for example data.columns: {prompt: question, completion: answer}",
    )


def _renamed(columns: Columns, source: RowSource, where: str) -> Columns:
    """As `rename_columns`; a row without a column of the map counts with what it has."""
    try:
        return rename_columns(columns, source, where)
    except DareError:
        return columns


def parse_row(uid: str, where: str, columns: Columns, row_format: RowFormat, data: DataRecipe) -> AnyRow:
    """One row. Raises DareError naming its place and what is wrong with it."""
    return _PARSERS[row_format](uid, where, columns, data)


# Formats


def _parse_messages(uid: str, where: str, columns: Columns, data: DataRecipe) -> Row:
    messages = _with_system(_messages(columns, "messages", where), data)
    prompt, completion = _split_conversation(messages, data, where)
    return Row(uid, where, prompt, completion)


def _parse_prompt_completion(uid: str, where: str, columns: Columns, data: DataRecipe) -> Row:
    prompt = _prompt(columns, data, where)
    completion = _text_or_messages(columns, "completion", where)
    meta = {name: value for name, value in columns.items() if name not in ("prompt", "completion")}
    return Row(uid, where, prompt, _completion(prompt, completion, "completion", where), meta)


def _parse_prompt_only(uid: str, where: str, columns: Columns, data: DataRecipe) -> Row:
    meta = {name: value for name, value in columns.items() if name != "prompt"}
    return Row(uid, where, _prompt(columns, data, where), None, meta)


def _parse_preference(uid: str, where: str, columns: Columns, data: DataRecipe) -> PairRow:
    chosen, rejected = (_text_or_messages(columns, side, where) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise DareError("chosen and rejected are equal", where=where, fix="remove the row: nothing is preferred")
    if not isinstance(chosen, str) and not isinstance(rejected, str) and chosen[0]["role"] != "assistant":
        prompt, chosen, rejected = _shared_prompt(chosen, rejected, where)
        prompt = _with_system(prompt, data)
        return PairRow(uid, where, prompt, chosen, rejected)
    if columns.get("prompt") is None:
        raise DareError(
            "the pair has no prompt",
            where=where,
            got=", ".join(columns),
            expected="a column prompt, or both sides as whole conversations",
        )
    given = _prompt(columns, data, where)
    sides = [_completion(given, side, name, where) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    return PairRow(uid, where, given, *sides)


def _parse_text(uid: str, where: str, columns: Columns, data: DataRecipe) -> TextRow:
    text = columns.get("text")
    if not isinstance(text, str):
        raise _malformed(columns, "text", where, "text")
    if not text:
        raise DareError("the text is empty", where=where, fix="remove the row")
    return TextRow(uid, where, _checked(text, "text", where))


def _parse_tokens(uid: str, where: str, columns: Columns, data: DataRecipe) -> TokenRow:
    ids, labels = (_integers(columns, name, where) for name in ("input_ids", "labels"))
    if len(ids) != len(labels):
        raise DareError("ids and labels differ in length", where=where, got=f"{len(ids)} ids, {len(labels)} labels")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, NO_LOSS):
            raise DareError(
                "a label is neither the token itself nor -100",
                where=f"{where}, position {place}",
                got=f"label {label}, token {token}",
                expected="labels that are not shifted",
            )
    if all(label == NO_LOSS for label in labels):
        raise DareError("no label carries loss", where=where, got=f"{len(labels)} labels of -100")
    return TokenRow(uid, where, ids, labels)


_PARSERS: dict[RowFormat, Callable[[str, str, Columns, DataRecipe], AnyRow]] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "prompt_only": _parse_prompt_only,
    "preference": _parse_preference,
    "text": _parse_text,
    "tokens": _parse_tokens,
}


# Parts


def _split_conversation(messages: Messages, data: DataRecipe, where: str) -> tuple[Messages, Messages]:
    """What is given, and what is learnt: from the first turn with loss to the end."""
    has_loss = [message["role"] in data.loss_roles for message in messages]
    if not has_loss[-1]:
        raise DareError(
            f"the last message must be the {' or '.join(data.loss_roles)}'s", where=where, got=messages[-1]["role"]
        )
    start = has_loss.index(True) if data.loss_turns == "all" else len(messages) - 1
    if start == 0 and messages[0]["role"] == "assistant":
        raise DareError("the conversation begins with the assistant", where=where, expected="a user message first")
    return messages[:start], messages[start:]


def _shared_prompt(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, Messages, Messages]:
    """Two whole conversations: what they have in common, and how each goes on."""
    pairs = zip(chosen, rejected, strict=False)
    start = next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(chosen), len(rejected)))
    ends = (chosen[start:], rejected[start:])
    for name, end in zip(("chosen", "rejected"), ends, strict=True):
        if start == 0 or not end or end[0]["role"] != "assistant" or end[-1]["role"] != "assistant":
            raise DareError(
                f"{name} does not answer the prompt that both sides share",
                where=where,
                got=f"{start} messages in common, then " + (", ".join(turn["role"] for turn in end) or "nothing"),
                expected="the same messages up to where two assistant messages differ",
            )
    return chosen[:start], *ends


def _prompt(columns: Columns, data: DataRecipe, where: str) -> str | Messages:
    prompt = _text_or_messages(columns, "prompt", where)
    if isinstance(prompt, str) and data.is_chat:
        prompt = ({"role": "user", "content": prompt},)
    if not isinstance(prompt, str):
        return _with_system(prompt, data)
    if data.system is not None:
        raise DareError("plain text has no system message", where=where, fix="set data.is_chat, or remove data.system")
    return prompt


def _completion(prompt: str | Messages, completion: str | Messages, name: str, where: str) -> str | Messages:
    """The completion in the form of its prompt."""
    if completion == "":
        raise DareError(f"the {name} is empty", where=where, fix=f"remove the row or give it a {name}")
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise DareError(f"the prompt is text, the {name} messages", where=where, expected="two of a kind")
        return completion
    turns = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
    if turns[-1]["role"] != "assistant":
        raise DareError(f"the {name} must end with the assistant", where=where, got=turns[-1]["role"])
    return turns


def _with_system(messages: Messages, data: DataRecipe) -> Messages:
    if data.system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return ({"role": "system", "content": data.system}, *messages)


def _text_or_messages(columns: Columns, name: str, where: str) -> str | Messages:
    value = columns.get(name)
    return _checked(value, name, where) if isinstance(value, str) else _messages(columns, name, where)


def _messages(columns: Columns, name: str, where: str) -> Messages:
    value = columns.get(name)
    expected = "text" if name != "messages" else ""
    expected += (" or " if expected else "") + 'a list of {"role": ..., "content": "text"}'
    if not isinstance(value, list) or not value:
        raise _malformed(columns, name, where, expected)
    messages: list[Message] = []
    for message in value:
        is_message = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_message:
            raise DareError(f"{name} has a malformed message", where=where, got=repr(message)[:80], expected=expected)
        if message["role"] not in _ROLES:
            raise unknown_name("role", message["role"], _ROLES, where=where)
        if message["role"] == "assistant" and not message["content"].strip():
            raise DareError(f"{name} has an empty assistant message", where=where, fix="remove the row or fill it")
        messages.append({"role": message["role"], "content": _checked(message["content"], name, where)})
    return tuple(messages)


def _integers(columns: Columns, name: str, where: str) -> tuple[int, ...]:
    value = columns.get(name)
    is_ids = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    if not is_ids:
        raise _malformed(columns, name, where, "a list of token ids")
    return tuple(value or ())


def _malformed(columns: Columns, name: str, where: str, expected: str) -> DareError:
    """The error for a column that is missing or holds something else."""
    value: Any = columns.get(name)
    if value is None:
        fix = "all rows of a source have the same columns; give other rows a source of their own"
        return DareError(f"the row has no {name}", where=where, got=", ".join(columns), expected=expected, fix=fix)
    return DareError(f"{name} is malformed", where=where, got=repr(value)[:80], expected=expected)


def _checked(text: str, name: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DareError(f"{name} is not valid Unicode", where=where, got=str(error)) from None
    return text
