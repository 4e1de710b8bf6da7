"""A conversation in the terminal: lines in, replies out, the canvas filling in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from dare.core.errors import DareError, unknown_name
from dare.core.text import Completion, Message
from dare.families.base import Family
from dare.families.tokenizer import decode as decode_text
from dare.terminal.canvas import CanvasView
from dare.terminal.text import visible

_COMMANDS = {"/reset": "forget the conversation", "/exit": "leave; so does the end of the input", "/help": "show this"}
_PROMPT = "> "


class ChatModel(Protocol):
    """What a conversation needs of a `dare.model.Model`."""

    family: Family
    tokenizer: Any

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        seed: int = ...,
        on_step: Callable[[Any], None] | None = ...,
        **decode: Any,
    ) -> list[Completion]: ...


class Chat:
    """A conversation with one model, rendered with its checkpoint's own chat template.

    decode  options of `dare.core.decode.Decode`. A reply is cut at its EOS anyway, so unless told otherwise nothing is
            denoised beyond the block that holds one.

    A reply depends on (weights, conversation, seed, options): the same lines give the same conversation again.
    Raises DareError for a checkpoint without a tokenizer or a chat template.
    """

    def __init__(
        self, model: ChatModel, decode: dict[str, Any], *, seed: int, system: str | None, console: Console | None = None
    ) -> None:
        if model.tokenizer is None or not model.tokenizer.chat_template:
            raise DareError(
                "this checkpoint cannot chat",
                got="no chat template" if model.tokenizer is not None else "no tokenizer",
                fix="use a checkpoint that was tuned for chat, or `dare generate --prompt TEXT`",
            )
        self.model = model
        self.decode = {"eos_stop": True, **decode}
        self.seed = seed
        self.console = console or Console(highlight=False)
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._opening)

    def run(self, lines: Iterable[str], *, is_interactive: bool) -> None:
        """Answer every line until /exit or the end.

        Raises DareError for a line that cannot be answered; if `is_interactive`, says so and waits for the next.
        """
        for line in lines:
            text = line.strip()
            if text == "/exit":
                return
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self.reply(text)
            except DareError as error:
                if not is_interactive:
                    raise
                self.console.print(Text(f"error: {error}", style="red"), soft_wrap=True)
            except KeyboardInterrupt:
                if not is_interactive:
                    raise
                self.console.print(Text("stopped; the message is forgotten", style="yellow"))

    def reply(self, text: str) -> str:
        """The model's answer to one user message, printed; both join the conversation unless an error is raised."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._stream(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.console.print(Text(visible(answer, keep="\n\t")), soft_wrap=True)
        return answer

    def _stream(self, messages: list[dict[str, str]]) -> str:
        if not self.console.is_terminal:
            (completion,) = self.model.generate([messages], seed=self.seed, **self.decode)
            return (completion.text or "").strip()
        spec = self.model.family.spec
        with CanvasView(self._token_text, spec.mask_id, spec.eos_ids, self.console, is_reply_only=True) as view:
            (completion,) = self.model.generate([messages], seed=self.seed, on_step=view.on_step, **self.decode)
        return (completion.text or "").strip()

    def _token_text(self, token: int) -> str:
        return decode_text(self.model.tokenizer, [token], has_special=True)

    def _command(self, text: str) -> None:
        if text == "/reset":
            self.messages = list(self._opening)
            self.console.print(Text("the conversation is empty again", style="dim"))
        elif text == "/help":
            for name, meaning in _COMMANDS.items():
                self.console.print(Text(f"{name:8}{meaning}", style="dim"))
        else:
            raise unknown_name("command", text.split()[0], _COMMANDS)


def read_lines(console: Console) -> Iterator[str]:
    """What the user types, line by line; lines of a pipe or a file are repeated, so that the output can be read."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            console.print(Text(_PROMPT + visible(line.rstrip("\n")), style="dim"), soft_wrap=True)
            yield line
        return
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            return
