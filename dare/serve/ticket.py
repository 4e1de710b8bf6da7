"""Between the engine's thread and the event loop: what is known of a request's rows, and a bell."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from dare.core.text import Completion
from dare.serve.errors import ApiError


class CanvasNow(NamedTuple):
    """A completion after `step` denoising steps; the mask id where nothing is committed."""

    step: int
    tokens: list[int]


class Ticket:
    """The engine replaces entries and rings; the loop reads the newest ones when it gets to it.

    A client that reads slowly therefore misses intermediate states, and neither memory nor the engine waits for it.

    settled      tokens of complete blocks, by row
    canvases     the newest canvas, by row; None until there is one
    completions  by row; None until the row has ended
    values       log-likelihoods, for a request that asked for them
    error        why there will be no result
    """

    def __init__(self, num_rows: int) -> None:
        self.settled: list[list[int]] = [[] for _ in range(num_rows)]
        self.canvases: list[CanvasNow | None] = [None] * num_rows
        self.completions: list[Completion | None] = [None] * num_rows
        self.values: list[float] | None = None
        self.error: ApiError | None = None
        self._loop, self._bell = asyncio.get_running_loop(), asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or self.values is not None or None not in self.completions

    def ring(self) -> None:
        """From any thread: something has changed."""
        self._loop.call_soon_threadsafe(self._bell.set)

    async def news(self) -> None:
        """Wait for the next change since the last call. Raises the error, if there is one."""
        await self._bell.wait()
        self._bell.clear()
        if self.error is not None:
            raise self.error

    async def done(self) -> None:
        """Wait for the end. Raises the error, if there is one."""
        while not self.is_done:
            await self.news()
        if self.error is not None:
            raise self.error
