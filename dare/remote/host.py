"""A model that completes rows for a rollout server: what waits is denoised together, weights can be replaced."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.families.base import Family
from dare.families.weights import load_weights
from dare.rollout.engine import denoise
from dare.rollout.plan import make_plan

_GATHER_S = 0.01  # a call of the network costs more than that, however few rows it has


@dataclass(frozen=True)
class Order:
    """A row to complete.

    num_tokens      completion positions that are returned; the last block is denoised whole
    is_eos_ignored  go on after an EOS instead of ending with it
    """

    prompt: tuple[int, ...]
    num_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    is_eos_ignored: bool
    key: Key
    sample_id: int


@dataclass(frozen=True)
class Completed:
    """A completed row.

    steps           of each token, 0-based; they go on through the row
    steps_in_block  the same, from 0 again in every block
    logp            of each token when it was committed, at the row's temperature (1 if greedy), nats
    version         label of the weights that made it
    """

    tokens: list[int]
    steps: list[int]
    steps_in_block: list[int]
    logp: list[float]
    is_ended: bool
    version: str


class _Row:
    """A row on its way; one of `done` and `error` is there when its batch is."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.done: Completed | None = None
        self.error: DareError | None = None


class Host:
    """One model. `decode` holds what a request does not say: unmask policy, steps, block length."""

    def __init__(self, family: Family, decode: Decode, name: str) -> None:
        """Raises DareError for decode options that do not fit the family."""
        self.family, self.decode, self.name = family, decode, name
        self.block_length = make_plan(family, decode).block_length
        self.version = "default"
        self._waiting: list[_Row] = []
        self._lock = threading.Lock()
        self._model = ThreadPoolExecutor(1, thread_name_prefix="dare-host")  # one call of the network at a time

    def complete(self, order: Order) -> Completed:
        """One row. Raises DareError for a prompt or options that do not fit the model."""
        row = _Row(order)
        with self._lock:
            self._waiting.append(row)
        self._model.submit(self._drain).result()  # after it, or an earlier one, has taken the row along
        if row.error is not None:
            raise row.error
        if row.done is None:
            raise RuntimeError("the batch of this row failed")
        return row.done

    def load(self, folder: Path, version: str) -> None:
        """Replace the weights between two batches. Raises DareError as `load_weights`, before anything is changed."""

        def replace() -> None:
            load_weights(self.family, folder)
            self.version = version

        self._model.submit(replace).result()

    def close(self) -> None:
        """Finish what was asked for, then stop."""
        self._model.shutdown()

    def _drain(self) -> None:
        """Complete everything that waits; while more is coming in, that is awaited first."""
        num = 0
        while len(self._waiting) > num:
            num = len(self._waiting)
            time.sleep(_GATHER_S)
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for rows in _alike(waiting):
            self._run(rows)

    def _run(self, rows: list[_Row]) -> None:
        try:
            found = self._denoise([row.order for row in rows])
        except DareError as error:
            if len(rows) == 1:
                rows[0].error = error
                return
            for row in rows:  # one row that does not fit is no fault of the others
                self._run([row])
            return
        for row, completed in zip(rows, found, strict=True):
            row.done = completed

    def _denoise(self, orders: list[Order]) -> list[Completed]:
        first = orders[0]
        longest = max(order.num_tokens for order in orders)
        given = {
            "gen_length": longest + -longest % self.block_length,
            "temperature": first.temperature,
            "top_k": first.top_k,
            "top_p": first.top_p,
            "eos_stop": not first.is_eos_ignored,
        }
        decode = Decode.model_validate({**self.decode.model_dump(), **given})
        prompts, ids = [list(order.prompt) for order in orders], [order.sample_id for order in orders]
        trace = denoise(self.family, prompts, decode, first.key, ids)
        return [self._completed(trace, row, order) for row, order in enumerate(orders)]

    def _completed(self, trace: TraceBatch, row: int, order: Order) -> Completed:
        place_N = trace.canvas.is_completion_BS[row].nonzero()[:, 0]
        steps, blocks = trace.step_map_BS[row, place_N].tolist(), trace.canvas.block_BS[row, place_N].tolist()
        first: dict[int, int] = {}
        for block, step in zip(blocks, steps, strict=True):
            first[block] = min(step, first.get(block, step))
        tokens = trace.canvas.input_BS[row, place_N].tolist()[: order.num_tokens]
        ends = [place for place, token in enumerate(tokens) if token in self.family.spec.eos_ids]
        num = len(tokens) if order.is_eos_ignored or not ends else ends[0] + 1
        return Completed(
            tokens=tokens[:num],
            steps=steps[:num],
            steps_in_block=[step - first[block] for block, step in zip(blocks[:num], steps[:num], strict=True)],
            logp=trace.logp_BS[row, place_N[:num]].tolist(),
            is_ended=bool(ends),
            version=self.version,
        )


def _alike(waiting: list[_Row]) -> list[list[_Row]]:
    """Rows that can be denoised in one call, in the order in which they came."""
    groups: dict[object, list[_Row]] = {}
    for row in waiting:
        order = row.order
        options = (order.num_tokens, order.temperature, order.top_k, order.top_p, order.is_eos_ignored, order.key)
        groups.setdefault(options, []).append(row)
    return list(groups.values())
