"""Training data on a terminal: a row under noise, how long rows are, what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from dare.terminal.text import visible

_MASKED = "░"
_BAR = "█"
_PARTS = " ▏▎▍▌▋▊▉"
_NUM_BINS = 12
_BAR_WIDTH = 40


def print_noise(
    levels: Sequence[float],
    copies: Sequence[list[int]],
    num_prompt: int,
    token_text: Callable[[int], str],
    mask_id: int,
    console: Console,
) -> None:
    """The prompt once, then the completion at each noise level: masked positions shaded, the rest in green."""
    if num_prompt:
        console.print(Text("".join(visible(token_text(token)) for token in copies[0][:num_prompt]), style="dim"))
    for level, ids in zip(levels, copies, strict=True):
        completion = ids[num_prompt:]
        line = Text.assemble((f"t = {level:.2f}  {completion.count(mask_id)}/{len(completion)} masked  ", "bold"))
        for token in completion:
            is_masked = token == mask_id
            line.append(_MASKED if is_masked else visible(token_text(token)), style="yellow" if is_masked else "green")
        console.print(line, soft_wrap=True)


def print_lengths(name: str, lengths: Sequence[int], console: Console) -> None:
    """A line of statistics and a histogram of lengths in tokens."""
    ordered = sorted(lengths)
    share = {percent: ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] for percent in (50, 95)}
    console.print(
        Text.assemble(
            (f"{name}: ", "bold"),
            f"mean {statistics.fmean(ordered):.1f}, median {share[50]}, 95 % within {share[95]}, "
            f"longest {ordered[-1]}, shortest {ordered[0]} tokens",
        )
    )
    bins = histogram(ordered, _NUM_BINS)
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        width = _BAR_WIDTH * count / most
        bar = _BAR * int(width) + _PARTS[int(width % 1 * 8)].strip()
        console.print(Text.assemble(f"{low:>7}-{high:<7} ", (bar, "cyan"), f" {count}"))


def histogram(lengths: Sequence[int], max_bins: int) -> list[tuple[int, int, int]]:
    """(lowest, highest, how many) of at most `max_bins` ranges of equal width that cover all lengths."""
    lowest, highest = min(lengths), max(lengths)
    width = -(-(highest - lowest + 1) // max_bins)
    bins: list[tuple[int, int, int]] = []
    for low in range(lowest, highest + 1, width):
        bins.append((low, low + width - 1, sum(low <= length < low + width for length in lengths)))
    return bins
