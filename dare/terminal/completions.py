"""What `dare generate` prints: text for people, or one JSON object per completion."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dare.core.text import Completion
from dare.terminal.settings import PromptWords
from dare.terminal.text import visible


def print_completions(
    prompts: Sequence[PromptWords], completions: Sequence[Completion], *, is_json: bool, console: Console | None = None
) -> None:
    """Print each prompt with its completion, its cost and how it ended."""
    console = console or Console(highlight=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        if is_json:
            record = {"prompt": prompt, **dataclasses.asdict(completion)}
            console.out(json.dumps(record, ensure_ascii=False))  # .out neither wraps nor reads markup
            continue
        console.print(Text(visible(prompt_text(prompt)), style="dim"), soft_wrap=True)
        text = ids_text(completion.tokens) if completion.text is None else completion.text
        console.print(Text(visible(text, keep="\n\t")), soft_wrap=True)
        console.print(Text(_cost(completion), style="cyan"), soft_wrap=True)


def prompt_text(prompt: PromptWords) -> str:
    """A prompt in words, whichever form it was given in."""
    if isinstance(prompt, str):
        return prompt
    parts = [f"{item['role']}: {item['content']}" if isinstance(item, dict) else str(item) for item in prompt]
    return " ".join(parts)


def ids_text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _cost(completion: Completion) -> str:
    num = len(completion.tokens)
    ending = "ended by EOS" if completion.finish == "eos" else "full length"
    per_forward = f"{num / completion.nfe:.2f} tokens/forward" if completion.nfe else "no forward"
    return f"[{num} tokens, {completion.nfe} forwards, {per_forward}, {ending}]"
