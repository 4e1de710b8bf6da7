"""Training rows as the model sees them: every token, and a mark under those that carry loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from dare.terminal.text import visible

InspectedToken = tuple[str, bool, bool]  # text, belongs to the prompt, carries loss

_MARKS = {"prompt": ("·", "dim"), "loss": ("^", "bold green"), "no loss": ("-", "yellow")}


def print_row(uid: str, tokens: Sequence[InspectedToken], console: Console) -> None:
    """One row: its lengths, then lines of tokens with a line of marks under each."""
    num_prompt = sum(is_prompt for _, is_prompt, _ in tokens)
    num_loss = sum(has_loss for _, _, has_loss in tokens)
    lengths = f"{num_prompt} prompt + {len(tokens) - num_prompt} completion tokens, {num_loss} carry loss"
    console.print(Text.assemble((visible(uid), "bold"), f"  {lengths}"))
    for cells in _wrap(tokens, console.width):
        words, marks = Text(), Text()
        for text, kind in cells:
            mark, style = _MARKS[kind]
            width = Text(text).cell_len
            words.append(text, style=style)
            words.append(" ")
            marks.append(mark * width, style=style)
            marks.append(" ")
        console.print(words, no_wrap=True, overflow="ignore", crop=False)
        console.print(marks, no_wrap=True, overflow="ignore", crop=False)


def print_legend(console: Console) -> None:
    """What the marks mean."""
    legend = Text("marks: ")
    for kind, (mark, style) in _MARKS.items():
        legend.append(f"{mark} {kind}  ", style=style)
    console.print(legend)


def _wrap(tokens: Iterable[InspectedToken], width: int) -> Iterable[list[tuple[str, str]]]:
    """Lines of (shown text, kind) that fit into `width` columns, at least one token each."""
    line: list[tuple[str, str]] = []
    used = 0
    for text, is_prompt, has_loss in tokens:
        shown = visible(text).replace(" ", "␣") or "∅"
        size = Text(shown).cell_len + 1
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append((shown, "prompt" if is_prompt else "loss" if has_loss else "no loss"))
        used += size
    if line:
        yield line
