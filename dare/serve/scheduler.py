"""The engine's thread: rows of all clients, batched as they come.

    submit -> waiting, in order of arrival -> an open run of one plan -> tickets
                                           -> a likelihood, one request at a time

Rows whose decode options differ only in length share a run; they join it as seats get free. Others wait until it is
empty: no later row joins once the oldest of them has waited `PATIENCE_S`. Who shares a batch changes no result.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.evals.likelihood import Likelihood, Request, log_likelihoods
from dare.families.base import Family
from dare.rollout.open_run import OpenRun, RowRequest
from dare.rollout.plan import Plan
from dare.serve.errors import ApiError
from dare.serve.metrics import Metrics
from dare.serve.ticket import CanvasNow, Ticket

PATIENCE_S = 0.5


@dataclass(eq=False)
class RowJob:
    """A completion to make, of the row `index` of its ticket.

    has_canvas  whether the ticket is told of every step, not of complete blocks only
    """

    ticket: Ticket
    index: int
    request: RowRequest
    plan: Plan
    has_canvas: bool = False
    is_given_up: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class ScoreJob:
    """Likelihoods to estimate."""

    ticket: Ticket
    requests: list[Request]
    options: Likelihood
    key: Key
    is_given_up: bool = False
    since: float = field(default_factory=time.monotonic)


Job = RowJob | ScoreJob


class _GivenUp(Exception):
    """Leaves a computation whose client has gone."""


class Scheduler:
    """Owns the model while the server runs. `submit` and `give_up` may be called from any thread."""

    def __init__(self, family: Family, metrics: Metrics, *, num_seats: int, width: int, max_queue: int) -> None:
        self._family, self._metrics = family, metrics
        self._num_seats, self._width, self._max_queue = num_seats, width, max_queue
        self._waiting: deque[Job] = deque()
        self._is_busy = False
        self._changed = threading.Condition()
        self._is_draining = False
        self._is_stopped = False
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="dare-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return self.fault is not None or (not self._waiting and not self._is_busy)

    @property
    def status(self) -> Literal["ok", "draining", "failed"]:
        """Whether new jobs are taken."""
        if self.fault is not None:
            return "failed"
        return "draining" if self._is_draining else "ok"

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these or none.

        Raises ApiError: 429 if the queue is full, 503 if the server is being stopped or the engine has failed.
        """
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(jobs) > self._max_queue:
                raise ApiError(429, f"{len(self._waiting)} completions are waiting; try again later", code="queue_full")
            self._waiting.extend(jobs)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def give_up(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: those that wait are forgotten, those that run end with their next step."""
        with self._changed:
            gone = set(jobs)
            for job in gone:
                job.is_given_up = True
            left = deque(job for job in self._waiting if job not in gone)
            self._metrics.given_up.inc(len(self._waiting) - len(left))
            self._waiting = left
            self._metrics.waiting.set(len(self._waiting))

    def drain(self) -> None:
        """Take nothing new; what is here goes on."""
        with self._changed:
            self._is_draining = True

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step that it is in; whoever waits gets an error."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._fail(self._take_all(), ApiError(503, "the server was stopped", code="stopped"))

    def _check_open(self) -> None:
        if self.fault is not None:
            raise ApiError(503, "the engine has failed", code="engine_failed")
        if self._is_draining:
            raise ApiError(503, "the server is being stopped", code="draining")

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                if isinstance(job, ScoreJob):
                    self._score(job)
                else:
                    self._denoise(job.plan)
        except BaseException as error:
            # What nobody foresaw ends the thread: clients hear of it, and the server ends with it.
            self.fault = error
            self._fail(self._take_all(), ApiError(500, "the engine has failed", code="engine_failed"))
            raise

    def _next(self) -> Job | None:
        """The job that has waited longest, still waiting if it is a row; None at the end."""
        with self._changed:
            self._is_busy = False
            self._changed.wait_for(lambda: self._waiting or self._is_stopped)
            if self._is_stopped:
                return None
            self._is_busy = True
            return self._waiting.popleft() if isinstance(self._waiting[0], ScoreJob) else self._waiting[0]

    def _take_all(self) -> list[Job]:
        with self._changed:
            taken = list(self._waiting)
            self._waiting.clear()
            return taken

    def _admit(self, plan: Plan, num_free: int) -> list[RowJob]:
        """Rows that may join the run now, taken from the queue."""
        with self._changed:
            limit = time.monotonic() - PATIENCE_S
            admitted: list[RowJob] = []
            for job in self._waiting:
                fits = isinstance(job, RowJob) and job.plan == plan
                if len(admitted) == num_free or (not fits and job.since < limit):
                    break
                if isinstance(job, RowJob) and fits:
                    admitted.append(job)
            if admitted:
                taken = set(admitted)
                self._waiting = deque(job for job in self._waiting if job not in taken)
            self._metrics.waiting.set(len(self._waiting))
            return admitted

    def _denoise(self, plan: Plan) -> None:
        """An open run of one plan, until it is empty."""
        running: dict[int, RowJob] = {}
        failure = ApiError(500, "the engine has failed", code="engine_failed")
        try:
            with plan.running(self._family):
                run = OpenRun(self._family, plan, num_seats=self._num_seats, width=self._width)
                while not self._is_stopped:
                    for job in self._admit(plan, run.num_free):
                        running[run.join(job.request)] = job
                    if run.is_empty:
                        break
                    self._step(run, running)
                failure = ApiError(503, "the server was stopped", code="stopped")
        except (DareError, RuntimeError) as error:  # of torch: out of memory, say; the next run begins anew
            failure = ApiError(500, f"the engine failed: {_first_line(error)}")
        finally:
            self._fail(list(running.values()), failure)
            self._metrics.seated.set(0)

    def _step(self, run: OpenRun, running: dict[int, RowJob]) -> None:
        """One denoising step, and word of it to all who listen."""
        for place, job in running.items():
            if job.is_given_up:
                run.leave(place)
        ended = run.step()
        self._metrics.seated.set(run.num_seated)
        self._metrics.steps.inc()
        self._metrics.row_steps.inc(run.num_seated + len(ended))
        advanced = run.advanced()
        for place, job in running.items():
            if place in advanced:
                job.ticket.settled[job.index] = advanced[place]
            if job.has_canvas:
                job.ticket.canvases[job.index] = CanvasNow(*run.canvas(place))
            if place in advanced or job.has_canvas:
                job.ticket.ring()
        for place in ended:
            self._finish(run, place, running[place])
            del running[place]

    def _finish(self, run: OpenRun, place: int, job: RowJob) -> None:
        try:
            completion = run.take(place)
        except DareError as error:
            self._fail([job], ApiError(500, _first_line(error), code="not_finite"))
            return
        if job.is_given_up:
            self._metrics.given_up.inc()
        else:
            self._metrics.completion_tokens.inc(len(completion.tokens))
        job.ticket.completions[job.index] = completion
        job.ticket.ring()

    def _score(self, job: ScoreJob) -> None:
        def check(done: int, total: int) -> None:
            if job.is_given_up or self._is_stopped:
                raise _GivenUp

        try:
            job.ticket.values = log_likelihoods(self._family, job.requests, job.options, job.key, check)
        except _GivenUp:
            job.ticket.error = ApiError(503, "the server was stopped", code="stopped")
        except (DareError, RuntimeError) as error:
            job.ticket.error = ApiError(500, f"the engine failed: {_first_line(error)}")
        self._metrics.likelihoods.inc(len(job.requests))
        job.ticket.ring()

    def _fail(self, jobs: Sequence[Job], error: ApiError) -> None:
        for job in jobs:
            job.ticket.error = error
            job.ticket.ring()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
