"""Waiting for what several workers were asked: all answers, or one error that says what went wrong.

A worker that has died leaves the others waiting in a collective operation, so answers are looked at as they come, and
the first failure ends the call. Failures that follow from a death, such as closed connections, are not the cause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from dare.core.errors import DareError

_GRACE_S = 10.0  # after a first failure: how long its cause may take to show, seconds
_FIX = "look for the cause in the workers' logs (out of memory, a lost node), then continue with --resume"


def answers(verb: str, futures: Sequence[Any], timeout_s: float, logs: str) -> list[Any]:
    """What the workers return, in their order. `logs` is where a user finds what they printed.

    Raises DareError if a worker returns one, has died, or does not answer in time; what a worker raises is raised here.
    """
    deadline = time.monotonic() + timeout_s
    pending, found = list(futures), {}
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise _late(verb, [futures.index(future) for future in pending], timeout_s, logs)
        (future,) = done
        found[future] = _outcome(future)
        if isinstance(found[future], Exception):
            raise _cause(verb, futures, logs)
    return [found[future] for future in futures]


def _outcome(future: Any) -> Any:
    """What a finished call returned, or what it raised."""
    try:
        return ray.get(future)
    except ray.exceptions.RayError as error:  # whatever a worker raises is one of these as well
        return error


def _cause(verb: str, futures: Sequence[Any], logs: str) -> Exception:
    """The failure to report: a death before all others, then an error of ours, then whatever was raised first."""
    done, _ = ray.wait(list(futures), num_returns=len(futures), timeout=_GRACE_S)
    outcomes = {index: _outcome(future) for index, future in enumerate(futures) if future in done}
    for index, failure in outcomes.items():
        if isinstance(failure, ray.exceptions.RayActorError):
            return DareError(
                f"a worker died during '{verb}'",
                where=f"executor verl, worker {index} of {len(futures)}; logs in {logs}",
                got=str(failure).strip().splitlines()[0],
                fix=_FIX,
            )
    raised = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    return next((failure for failure in raised if isinstance(failure, DareError)), raised[0])


def _late(verb: str, missing: list[int], timeout_s: float, logs: str) -> DareError:
    return DareError(
        f"a worker did not finish '{verb}' in time",
        where=f"executor.timeout_s; logs in {logs}",
        got=f"nothing from worker {', '.join(map(str, missing))} after {timeout_s:g} s",
        fix="raise executor.timeout_s if the work is that long; otherwise continue with --resume",
    )
