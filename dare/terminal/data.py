"""Training data on a terminal: rows and what carries loss, noise, how long rows are, what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.terminal.rows import print_legend, print_row
from dare.terminal.text import visible
from dare.training.data import inspect_row
from dare.training.inspection import Inspection, noisy_copies, padding_of

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
_MASKED = "░"
_BAR = "█"
_PARTS = " ▏▎▍▌▋▊▉"
_NUM_BINS = 12
_BAR_WIDTH = 40


def print_inspection(found: Inspection, recipe: Recipe, num: int, console: Console | None = None) -> None:
    """`num` rows, noise on the first one that has a completion, and what is known of all of them."""
    console = console or Console(highlight=False)
    for row in found.rows[:num]:
        print_row(row.uid, inspect_row(found.tokenizer, row), console)
    print_legend(console)
    noisy = next((row for row in found.rows if row.completion_ids), None)
    if noisy is not None:
        console.print(f"\nnoise on {visible(noisy.uid)}", markup=False)
        copies = noisy_copies(noisy, found.spec, TIMES, Key(recipe.seed))
        print_noise(TIMES, copies, len(noisy.prompt_ids), found.token_text, found.spec.mask_id, console)
    console.print(f"\nlengths of {'all' if found.is_whole else 'the first'} {len(found.rows)} rows")
    for name, values in found.lengths().items():
        print_lengths(name, values, console)
    for warning in found.tally.warnings() or ["no row was skipped, dropped or cut"]:
        console.print(warning, markup=False)
    padding = padding_of(recipe, found.rows)
    console.print(
        f"padding: {100 * padding.padded_share:.1f} % of all positions in {padding.num_batches} micro-batches of an "
        f"epoch; packed, train.pack_length={padding.pack_length}: none, in {padding.num_packs} forwards"
    )


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
