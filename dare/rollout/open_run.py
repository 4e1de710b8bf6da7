"""A rollout that rows may join and leave at any step: continuous batching for `dare serve`.

`denoise` knows all its rows beforehand; here a row comes with a prompt, a length, a key and a sample id of its own.
Both run the same steps, so a completion is the one that `denoise` gives for that row, whoever else is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from dare.core.errors import DareError
from dare.core.rng import Key, KeyTable, stable_id
from dare.core.text import Completion
from dare.core.types import GIVEN, Canvas
from dare.diffusion.trace import to_completions
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.engine import Run, Step
from dare.rollout.live import Live
from dare.rollout.plan import Plan, check_prompts
from dare.rollout.record import empty_trace, finished, record_rows

_ROWS_PER_SEAT = 2  # as many rows may wait for a seat as have one, so that no seat is empty for a step


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A prompt to complete, and what names its random numbers; see `denoise`."""

    prompt: tuple[int, ...]
    gen_length: int
    key: Key
    sample_id: int


class OpenRun:
    """Rows of one plan in a batch of fixed size; `RowRequest.gen_length` replaces the plan's.

    The caller packs weights and disables gradients around a run. A place is given out by `join` and free again when
    `step` names it among the ended ones.
    """

    def __init__(self, family: Family, plan: Plan, *, num_seats: int, width: int) -> None:
        """At most `num_seats` rows at a time, canvases of at most `width` positions."""
        self._family, self._plan, self._width = family, plan, width
        num_rows = num_seats * _ROWS_PER_SEAT
        self._keys = KeyTable([(Key(0), 0)] * num_rows)
        self._batch = _empty_batch(family, plan, num_rows, width)
        self._live = Live(self._batch, [], [0] * num_rows, num_seats)
        self._run = Run(family, plan, self._keys, self._batch, self._live)
        self._steps: Iterator[Step] = iter(())
        self._free = list(range(num_rows))
        self._requests: dict[int, RowRequest] = {}
        self._settled_until: dict[int, int] = {}  # by place, the position up to which `advanced` has told of

    @property
    def num_free(self) -> int:
        """How many more rows may join."""
        return len(self._free)

    @property
    def num_seated(self) -> int:
        """Rows that the last step denoised and that go on."""
        return len(self._live.rows)

    @property
    def is_empty(self) -> bool:
        """Whether no row is left."""
        return not self._requests

    def join(self, request: RowRequest) -> int:
        """The place of a new row. Raises DareError as `lay_out`."""
        canvas = lay_out(self._family, self._plan, request, self._width)
        place = self._free.pop()
        self._requests[place] = request
        self._keys.put(place, request.key, request.sample_id)
        place_B = torch.tensor([place], device=self._family.device)
        row = Batch.begin(
            _moved(canvas, self._family.device), place_B, self._plan.block_length, self._family.spec.mask_id
        )
        self._batch.put(place, row)
        self._live.join(place, stable_id(*request.prompt, "length", request.gen_length))
        return place

    def leave(self, place: int) -> None:
        """Give a row up: it ends after one more step, or after its first one if it has no seat yet."""
        self._batch.stop_B[place].clamp_(max=self._batch.step_B[place] + 1)

    def step(self) -> list[int]:
        """One denoising step of the seated rows; the places that ended with it. Rows that joined sit down after it."""
        step = next(self._steps, None)
        if step is None:  # nobody was seated
            self._steps = self._run.steps()
            step = next(self._steps, None)
        self._batch.edits.clear()
        return [] if step is None else step.ended

    def take(self, place: int) -> Completion:
        """The completion of a row that ended, without text; its place is free afterwards.

        Raises NonFiniteError if the network's output was not finite.
        """
        row_1, request = torch.tensor([place]), self._requests.pop(place)
        self._settled_until.pop(place, None)
        self._free.append(place)
        canvas = _moved(self._batch.canvas.rows(row_1.to(self._family.device)), torch.device("cpu"))
        trace = empty_trace(self._family, self._plan, canvas, [request.sample_id], 0)
        record_rows(self._batch, trace, row_1, torch.zeros_like(row_1), self._family.spec.pad_id)
        return to_completions(finished(trace))[0]

    def advanced(self) -> dict[int, list[int]]:
        """Rows that completed a block since the last call: their tokens in complete blocks, which stay as they are."""
        start_B = self._batch.start_B.tolist()
        found: dict[int, list[int]] = {}
        for place, request in self._requests.items():
            first, end = len(request.prompt), start_B[place]
            if end > max(first, self._settled_until.get(place, 0)):
                self._settled_until[place] = end
                found[place] = self._batch.canvas.input_BS[place, first:end].tolist()
        return found

    def canvas(self, place: int) -> tuple[int, list[int]]:
        """Denoising steps taken so far, and the completion as it stands, the mask id where nothing is committed."""
        start = len(self._requests[place].prompt)
        tokens: list[int] = self._batch.canvas.input_BS[place, start : int(self._batch.end_B[place])].tolist()
        return int(self._batch.step_B[place]), tokens


def lay_out(family: Family, plan: Plan, request: RowRequest, width: int) -> Canvas:
    """The canvas of one row with columns of padding up to `width`, on the CPU.

    Raises DareError for a prompt that does not fit the model, holds the mask token or takes more than `width` columns.
    """
    prompts = [list(request.prompt)]
    check_prompts(family, prompts)
    canvas = family.empty_canvas(prompts, request.gen_length, plan.block_length)
    if canvas.length > width:
        raise DareError(
            "prompt and completion are longer than allowed",
            got=f"prompt {len(request.prompt)} + completion {canvas.length - len(request.prompt)} tokens",
            expected=f"<= {width} tokens",
            fix="shorten the prompt or the completion",
        )
    padding = (0, width - canvas.length)
    # Padding is in a block after all others: whoever reads it by mistake still sees something.
    return replace(
        canvas,
        input_BS=functional.pad(canvas.input_BS, padding, value=family.spec.pad_id),
        is_completion_BS=functional.pad(canvas.is_completion_BS, padding),
        is_real_BS=functional.pad(canvas.is_real_BS, padding),
        block_BS=functional.pad(canvas.block_BS, padding, value=width),
    )


def _empty_batch(family: Family, plan: Plan, num_rows: int, width: int) -> Batch:
    """Rows that nobody denoises."""
    shape, device = (num_rows, width), family.device
    nothing_BS = torch.zeros(shape, dtype=torch.bool, device=device)
    canvas = Canvas(
        input_BS=torch.full(shape, family.spec.pad_id, device=device),
        is_completion_BS=nothing_BS,
        is_real_BS=nothing_BS.clone(),
        block_BS=torch.full(shape, width, device=device),
        attention=family.spec.attention,
    )
    batch = Batch.begin(canvas, torch.arange(num_rows, device=device), plan.block_length, family.spec.mask_id)
    batch.step_map_BS.fill_(GIVEN)
    return batch


def _moved(canvas: Canvas, device: torch.device) -> Canvas:
    return Canvas(
        canvas.input_BS.to(device),
        canvas.is_completion_BS.to(device),
        canvas.is_real_BS.to(device),
        canvas.block_BS.to(device),
        attention=canvas.attention,
    )
