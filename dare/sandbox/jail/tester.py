"""The process of the tests. The program's functions are stand-ins here, which ask the program's process."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from dare.sandbox.jail.wire import Channel, Closed, decode, encode

_CHANNEL, _ON = "_dare_channel", "_dare_on"


class ProgramEnded(BaseException):
    """The program's process is gone: no `except Exception` of a test may take that for the error it wanted."""


class Remote:
    """A value that is not plain data, such as a function: it lives in the program's process.

    Equal to nothing but itself, whatever the program's `__eq__` says. Its truth, length and items are what the program
    says: a plain value could say the same.
    """

    def __init__(self, channel: Channel, on: int) -> None:
        object.__setattr__(self, _CHANNEL, channel)
        object.__setattr__(self, _ON, on)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _ask_remote(self, "call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return _ask_remote(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask_remote(self, "set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask_remote(self, "item", key)

    def __iter__(self) -> Iterator[Any]:
        return iter(_ask_remote(self, "list"))

    def __len__(self) -> int:
        return int(_ask_remote(self, "length"))

    def __str__(self) -> str:
        return str(_ask_remote(self, "text"))

    def __bool__(self) -> bool:
        return _ask_remote(self, "truth") is True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Remote):
            return False
        return bool(object.__getattribute__(self, _ON) == object.__getattribute__(other, _ON))

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, _ON))


def run_tests(setup: str, tests: str, own_names: list[str], channel: Channel) -> tuple[str, str]:
    """("passed" | "failed", detail) of the program at the other end of the channel.

    `setup` is run first; names that neither it nor `tests` defines are the program's, and so are `own_names`.
    """
    try:
        failure = _error_of(_receive(channel))
        if failure is not None:
            return "failed", failure
        namespace: dict[str, Any] = {"__name__": "tests"}
        for part in (setup, tests):
            code = compile(part, "tests.py", "exec", dont_inherit=True)
            wanted = {name for name in _names(code) if name not in namespace and not hasattr(builtins, name)}
            namespace.update(_fetch(channel, wanted))
            exec(code, namespace)
            namespace.update(_fetch(channel, own_names))
    except ProgramEnded as error:
        return "failed", str(error)
    except BaseException as error:  # noqa: BLE001 - whatever a test raises is its result
        return "failed", f"{type(error).__name__}: {error}"[:500]
    return "passed", ""


def _fetch(channel: Channel, names: Iterable[str]) -> dict[str, Any]:
    """What the program's module holds under `names`, where it holds something."""
    found = {}
    for name in names:
        try:
            found[name] = _ask(channel, "fetch", name)
        except KeyError:
            continue
    return found


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _ask_remote(remote: Remote, operation: str, *arguments: Any, **keywords: Any) -> Any:
    channel, on = object.__getattribute__(remote, _CHANNEL), object.__getattribute__(remote, _ON)
    return _ask(channel, operation, on, *arguments, **keywords)


def _ask(channel: Channel, operation: str, on: str | int, *arguments: Any, **keywords: Any) -> Any:
    request = {
        "op": operation,
        "on": on,
        "args": [encode(item, _forget) for item in arguments],
        "kwargs": {name: encode(item, _forget) for name, item in keywords.items()},
    }
    try:
        channel.send(request)
    except Closed as error:
        raise ProgramEnded(str(error)) from None
    reply = _receive(channel)
    failure = _error_of(reply)
    if failure is not None:
        name = failure.partition(":")[0]
        kind = getattr(builtins, name, None)
        is_error = isinstance(kind, type) and issubclass(kind, Exception) and name not in _NEEDS_ARGUMENTS
        raise kind(failure) if is_error and kind is not None else RuntimeError(failure)
    try:
        return decode(reply["value"], lambda data: Remote(channel, int(data["r"])))
    except (Closed, KeyError) as error:
        raise ProgramEnded(f"no value: {error}") from None


_NEEDS_ARGUMENTS = ("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "ExceptionGroup")


def _forget(value: Any) -> dict[str, Any]:
    if isinstance(value, Remote):
        return {"r": object.__getattribute__(value, _ON)}
    raise TypeError(f"a test cannot hand over a {type(value).__name__}")


def _receive(channel: Channel) -> dict[str, Any]:
    try:
        reply = channel.receive()
    except Closed as error:
        raise ProgramEnded(f"the program ended: {error}") from None
    if not isinstance(reply, dict):
        raise ProgramEnded("the program sent what is no reply")
    return reply


def _error_of(reply: dict[str, Any]) -> str | None:
    if "error" not in reply:
        return None
    name, text = (str(item) for item in [*list(reply["error"]), "", ""][:2])
    return f"{name}: {text}"[:500]
