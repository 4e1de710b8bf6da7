"""A canvas filling step by step: a live view on a terminal, one frame per step anywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dare.terminal.text import visible

if TYPE_CHECKING:
    from torch import Tensor

MASKED = "░"
EOS = "∎"  # a tail of them is common, and their names are long
_MAX_ROWS = 8
_CONFIDENCE = ((0.9, "green"), (0.5, "yellow"))  # at least this probability
_LOW = "red"


class StepEvent(Protocol):
    """What a rollout reports after one denoising step of N rows (see `dare.rollout.engine.StepEvent`)."""

    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def ids_NS(self) -> Tensor: ...
    @property
    def is_committed_NS(self) -> Tensor: ...
    @property
    def logp_NS(self) -> Tensor: ...


class CanvasView:
    """A context manager whose `on_step` is the callback of a rollout.

    Prompts are dim, masked positions shaded, and committed tokens coloured by their probability at commit; those of
    the last step are bold. Shows the first few prompts; `is_reply_only` leaves prompts and legend out and takes the
    canvas away at the end, for a reply that is then printed.
    """

    def __init__(
        self,
        token_text: Callable[[int], str],
        mask_id: int,
        eos_ids: Collection[int],
        console: Console | None = None,
        *,
        is_reply_only: bool = False,
    ) -> None:
        self._is_reply_only = is_reply_only
        self._token_text = token_text
        self._mask_id = mask_id
        self._eos_ids = eos_ids
        self._console = console or Console(highlight=False)
        self._rows = [_Row() for _ in range(_MAX_ROWS)]
        self._num_frames = 0
        self._live: Live | None = None

    def __enter__(self) -> CanvasView:
        if not self._is_reply_only:
            self._console.print(confidence_legend())
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, auto_refresh=False, vertical_overflow="crop", transient=self._is_reply_only
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if not self._is_reply_only:
            self._console.print()

    def on_step(self, event: StepEvent) -> None:
        """Show the canvas as it is after a denoising step."""
        changed = []
        tensors = (event.ids_NS, event.is_committed_NS, event.logp_NS)
        for index, ids, is_new, logps in zip(event.rows, *(tensor.tolist() for tensor in tensors), strict=True):
            if index < _MAX_ROWS:
                self._rows[index].update(ids, is_new, logps)
                changed.append(index)
        if not changed:
            return
        self._num_frames += 1
        if self._live is not None:
            grid = Table.grid(padding=(0, 1))
            grid.add_column(justify="right")
            grid.add_column(overflow="fold")
            for index, row in enumerate(self._rows):
                if row.ids:
                    grid.add_row("" if self._is_reply_only else str(index + 1), self._line(index))
            self._live.update(grid, refresh=True)
        else:
            self._console.print(f"step {self._num_frames}")
            for index in sorted(changed):
                self._console.print(Text(f"{index + 1:>3}  ") + self._line(index), soft_wrap=True)

    def _line(self, index: int) -> Text:
        row = self._rows[index]
        line = Text()
        for position in range(row.length(self._mask_id)):
            if self._is_reply_only and row.is_given(position, self._mask_id):
                continue
            line.append(self._cell(row.ids[position]), style=row.style(position))
        return line

    def _cell(self, token: int) -> str:
        if token == self._mask_id:
            return MASKED
        return EOS if token in self._eos_ids else visible(self._token_text(token))


class _Row:
    """The canvas of one prompt and the probability at commit of what was committed."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._confidence: dict[int, float] = {}  # by position
        self._is_new: list[bool] = []

    def update(self, ids: list[int], is_new: list[bool], logps: list[float]) -> None:
        self.ids, self._is_new = ids, is_new
        self._confidence |= {position: math.exp(logps[position]) for position, new in enumerate(is_new) if new}

    def is_given(self, position: int, mask_id: int) -> bool:
        """Whether the position is neither masked nor was committed: prompt or padding."""
        return self.ids[position] != mask_id and position not in self._confidence

    def length(self, mask_id: int) -> int:
        """Up to the last position that is masked or was committed; what follows is padding."""
        shown = (position + 1 for position in range(len(self.ids)) if not self.is_given(position, mask_id))
        return max(shown, default=0)

    def style(self, position: int) -> str:
        """Dim for the prompt and for masks."""
        if position not in self._confidence:
            return "dim"
        colour = confidence_colour(self._confidence[position])
        return f"bold {colour}" if self._is_new[position] else colour


def confidence_colour(confidence: float) -> str:
    """The colour of a token by its probability when it was committed."""
    return next((colour for least, colour in _CONFIDENCE if confidence >= least), _LOW)


def confidence_legend() -> Text:
    """What the colours and signs of a canvas mean."""
    legend = Text(f"{MASKED} masked   {EOS} EOS   probability at commit: ")
    for least, colour in _CONFIDENCE:
        legend.append(f"≥ {least:g}  ", style=colour)
    return legend.append("lower", style=_LOW)
