"""Which tasks a harness runs and with what settings. No harness is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dare.core.errors import DareError
from dare.evals.presets import Planned, plan
from dare.evals.suite import Settings

OWN = "dare_"  # before the name of a benchmark of ours


def plan_tasks(
    preset: str | None,
    tasks: Sequence[str],
    *,
    family: str,
    checkpoint: str,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """Tasks in order, `dare_NAME` with the settings that a preset has for NAME, the harness's own with the defaults.

    Without `tasks`, all of the preset. Arguments and errors as in `dare.evals.presets.plan`; a preset knows nothing of
    a harness's own tasks, so together they are refused.
    """
    foreign = [name for name in tasks if not name.startswith(OWN)]
    if preset is not None and foreign:
        raise DareError(
            "a preset has settings for our own definitions only",
            where="--tasks",
            got=", ".join(foreign),
            expected=f"names such as {OWN}gsm8k",
            fix="leave --preset out and give the decode options",
        )
    planned = []
    whole: list[str | None] = [None]  # no task named: the preset's own
    for name in tasks or whole:
        asked = [] if name is None else [name.removeprefix(OWN)]
        rows = plan(preset, asked, family=family, checkpoint=checkpoint, model=model, overrides=dict(overrides or {}))
        planned += [replace(row, task=OWN + row.task if name is None else name) for row in rows]
    return planned


def lasting(settings: Settings) -> dict[str, Any]:
    """The settings that were given, as plain data, without those that change no result."""
    data = settings.model_dump(mode="json", exclude_unset=True)
    for section in ("decode", "likelihood"):
        data.get(section, {}).pop("batch_size", None)
    return data
