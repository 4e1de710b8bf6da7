"""Values between the process of the program and that of its tests: plain data, or a handle to what is not.

Nothing here runs code of the sender, as unpickling would, and nothing compares with the sender's `__eq__`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

MAX_BYTES = 8 << 20
_MAX_PLAIN = 1 << 53


class Closed(Exception):
    """The other side ended, or sent what is no message."""


class Channel:
    """Messages over two pipes: eight bytes of length, then JSON."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer

    def send(self, message: Any) -> None:
        """Raises Closed if the other side is gone or the message is too long."""
        data = json.dumps(message).encode()
        if len(data) > MAX_BYTES:
            raise Closed(f"a value of {len(data)} bytes")
        data = len(data).to_bytes(8, "big") + data
        try:
            while data:
                data = data[os.write(self._writer, data) :]
        except OSError:
            raise Closed("the other side ended") from None

    def receive(self) -> Any:
        """The next message. Raises Closed."""
        length = int.from_bytes(self._read(8), "big")
        if length > MAX_BYTES:
            raise Closed(f"a value of {length} bytes")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise Closed("no message") from None

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            part = os.read(self._reader, min(num_bytes - len(data), 1 << 16))
            if not part:
                raise Closed("the other side ended")
            data += part
        return bytes(data)


def encode(value: Any, remember: Callable[[Any], dict[str, Any]]) -> Any:
    """`value` as JSON. Subclasses of plain types become plain; `remember` makes a handle of everything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if -_MAX_PLAIN < number < _MAX_PLAIN else {"i": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return value
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"b": value.hex()}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("f", frozenset)):
        if isinstance(value, kind):
            return {tag: [encode(item, remember) for item in value]}
    if isinstance(value, dict):
        return {"d": [[encode(key, remember), encode(item, remember)] for key, item in dict.items(value)]}
    return remember(value)


def decode(data: Any, recall: Callable[[dict[str, Any]], Any]) -> Any:
    """The inverse of `encode`; `recall` turns a handle into an object. Raises Closed for anything else."""
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if not isinstance(data, dict) or not data:
        raise Closed("no value")
    tag, content = next(iter(data.items()))
    try:
        if tag == "i":
            return int(content, 16)
        if tag == "c":
            return complex(*content)
        if tag == "b":
            return bytes.fromhex(content)
        if tag == "d":
            return {decode(key, recall): decode(item, recall) for key, item in content}
        kinds: dict[str, Any] = {"l": list, "t": tuple, "s": set, "f": frozenset}
        if tag in kinds:
            return kinds[tag](decode(item, recall) for item in content)
        return recall(data)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise Closed("no value") from None
