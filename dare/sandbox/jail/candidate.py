"""The process of the program: it runs the code once and then answers calls until the tests are over.

Everything in this process may be changed by the code that it runs. It knows neither the tests nor the verdict.
"""

from __future__ import annotations

import sys
from typing import Any

from dare.sandbox.jail.wire import Channel, Closed, decode, encode


def serve(source: str, channel: Channel) -> None:
    """Run `source` as the module "program"; then answer requests. Returns when the other side closes.

    Replies: {"value": ...} or {"error": [name of the exception, its text]}; the first is that of the module itself.
    """
    module = type(sys)("program")
    sys.modules["program"] = module
    handles: list[Any] = []
    numbers: dict[int, int] = {}  # by identity, which `handles` keeps from being used again

    def remember(value: Any) -> dict[str, Any]:
        number = numbers.setdefault(id(value), len(handles))
        if number == len(handles):
            handles.append(value)
        return {"r": number, "type": type(value).__name__}

    def recall(data: dict[str, Any]) -> Any:
        return handles[data["r"]]

    def answer(request: dict[str, Any] | None) -> Any:
        if request is None:
            exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
            return None
        arguments = [decode(item, recall) for item in request["args"]]
        keywords = {name: decode(item, recall) for name, item in request["kwargs"].items()}
        on = request["on"]
        if request["op"] == "fetch":
            return vars(module)[on]
        return _OPERATIONS[request["op"]](handles[on], *arguments, **keywords)

    request = None
    while True:
        try:
            reply = {"value": encode(answer(request), remember)}
        except BaseException as error:  # noqa: BLE001 - inside the sandbox: whatever the code raises is its result
            reply = {"error": [type(error).__name__, str(error)[:500]]}
        try:
            channel.send(reply)
            request = channel.receive()
        except Closed:
            sys.stdout.flush()
            return


_OPERATIONS: dict[str, Any] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "list": lambda target: [item for item, _ in zip(target, range(100_000), strict=False)],
    "length": len,
    "truth": bool,
    "text": str,
}
