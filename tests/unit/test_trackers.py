"""Optional trackers: TensorBoard events are written; a missing package is one clear error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.training.trackers import build_trackers


def _recipe(**log: object) -> Recipe:
    data = {
        "name": "test",
        "model": {"create": {"family": "llada"}},
        "algorithm": "sft",
        "task": "chain_sum",
        "log": log,
    }
    return parse_recipe(data, where="test")


def test_tensorboard_events_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = build_trackers(_recipe(tensorboard=True), tmp_path)
    tracker.log(3, {"loss": 0.5, "reward/format": 1.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "reward/format"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_no_tracker_by_default(tmp_path: Path) -> None:
    assert build_trackers(_recipe(), tmp_path) == []


@pytest.mark.parametrize(
    ("log", "module", "extra"),
    [({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"), ({"wandb_project": "x"}, "wandb", "wandb")],
)
def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: dict[str, object], module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DareError, match=rf"dare-dllm\[{extra}\]"):
        build_trackers(_recipe(**log), tmp_path)
