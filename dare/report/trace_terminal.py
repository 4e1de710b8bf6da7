"""A trace in the terminal: its canvas step by step, and the choices of one step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dare.core.errors import DareError
from dare.report.trace_page import facts, notes, shown_piece
from dare.report.trace_rows import Candidate, Row, read_row, rule, verdict
from dare.rollout.trace_file import TraceFile
from dare.terminal.canvas import confidence_colour, confidence_legend

_SECONDS_PER_STEP = (0.06, 0.6)  # when playing: at least, at most
_PLAY_SECONDS = 12.0
_HELP = "← → step   Home End first, last   q quit"


@dataclass(frozen=True)
class Shown:
    """One row of one trace on the screen."""

    file: TraceFile
    row: Row

    def canvas(self, num_steps: int) -> Text:
        """The canvas after `num_steps` steps, coloured by probability; written tokens are bold, edited underlined."""
        mask_id, line = int(self.file.info["mask_id"]), Text()
        written: dict[int, Candidate] = {}
        for step in self.row.steps[:num_steps]:
            for position in step.remasked:
                written.pop(position, None)
            written |= {c.position: c for c in step.candidates if c.is_written}
        is_step = 0 < num_steps <= len(self.row.steps)
        fresh = self.row.steps[num_steps - 1].written if is_step else {}
        again = self.row.steps[num_steps - 1].remasked if is_step else []
        for position, token in enumerate(self.row.canvas(num_steps, mask_id)):
            if position in self.row.borders:
                line.append("│", style="dim")
            style = "reverse dim" if position in again and token == mask_id else "dim"
            if position in written:
                candidate = written[position]
                style = "default" if candidate.prob is None else confidence_colour(candidate.prob)
                style += " bold" if position in fresh else ""
                style += " underline" if candidate.held != mask_id else ""
            line.append(shown_piece(self.file, token), style=style)
        return line

    def choices(self, num_steps: int) -> Table:
        """The open positions of a step (1-based), what each proposed, and why it was committed or not."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("position", "candidate", "probability", "alternatives", "what happened"):
            table.add_column(column, justify="right" if column in ("position", "probability") else "left")
        step = self.row.steps[num_steps - 1]
        for c in step.candidates:
            tops = "  ".join(f"{shown_piece(self.file, token)} {prob:.2f}" for token, prob in c.alternatives)
            prob = Text("–") if c.prob is None else Text(f"{c.prob:.3f}", style=confidence_colour(c.prob))
            style = "bold" if c.is_written else ""
            name = Text(shown_piece(self.file, c.token), style=style)
            table.add_row(str(c.position), name, prob, Text(tops, style="dim"), Text(verdict(self.file.info, step, c)))
        for position in step.remasked:
            table.add_row(str(position), "", "", "", "masked again")
        return table


class TraceView:
    """Traces on a console, one below the other, all at the same step."""

    def __init__(self, files: Sequence[TraceFile], rows: Sequence[int], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._files = files
        self._shown = [Shown(file, read_row(file, index)) for file in files for index in self._rows_of(file, rows)]
        self.num_steps = max(len(shown.row.steps) for shown in self._shown)

    def head(self) -> None:
        """Print what the traces are and what they lack."""
        for file in self._files:
            words = "   ".join(f"{key} {value}" for key, value in facts(file))
            self.console.print(Text(f"{file.path}   ", style="bold") + Text(words, style="dim"), soft_wrap=True)
            for note in notes(file):
                self.console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
        legend = confidence_legend() + Text("   bold: written by this step   underlined: edited   │ block border")
        self.console.print(legend)

    def frame(self, num_steps: int) -> Group:
        """All canvases after `num_steps` steps."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for shown in self._shown:
            name = f"{shown.file.path.stem} {shown.row.label}" if len(self._files) > 1 else shown.row.label
            grid.add_row(name, shown.canvas(num_steps))
        return Group(Text(f"after step {num_steps} of {self.num_steps}", style="cyan"), grid)

    def print_all(self) -> None:
        """Every frame, one below the other."""
        for step in range(self.num_steps + 1):
            self.console.print(self.frame(step))

    def print_step(self, step: int) -> None:
        """One frame with the choices that the step had. Raises DareError if there is no such step."""
        if not 0 <= step <= self.num_steps:
            raise DareError("there is no such step", where="--step", got=step, expected=f"0 to {self.num_steps}")
        self.console.print(self.frame(step))
        for shown in self._shown:
            if 1 <= step <= len(shown.row.steps):
                words = rule(shown.file.info, shown.row.steps[step - 1])
                self.console.print(Text(f"{shown.row.label}  {words}", style="dim"), soft_wrap=True)
                self.console.print(shown.choices(step))

    def play(self) -> None:
        """Animate on a terminal; print all frames anywhere else."""
        if not self.console.is_terminal:
            self.print_all()
            return
        shortest, longest = _SECONDS_PER_STEP
        pause = min(longest, max(shortest, _PLAY_SECONDS / max(self.num_steps, 1)))
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            for step in range(self.num_steps + 1):
                live.update(self.frame(step), refresh=True)
                time.sleep(pause)

    def interact(self, keys: Iterable[str]) -> None:
        """Follow key presses until "q" or their end."""
        step = 0
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
            live.update(self._with_help(step), refresh=True)
            for key in keys:
                if key in ("q", "\x1b"):
                    return
                moved = {"left": step - 1, ",": step - 1, "home": 0, "end": self.num_steps}.get(key)
                if key in ("right", ".", " "):
                    moved = step + 1
                step = step if moved is None else max(0, min(self.num_steps, moved))
                live.update(self._with_help(step), refresh=True)

    def _with_help(self, step: int) -> Group:
        return Group(self.frame(step), Text(_HELP, style="dim"))

    def _rows_of(self, file: TraceFile, rows: Sequence[int]) -> Sequence[int]:
        return rows or range(min(file.num_rows, 8 // len(self._files)))
