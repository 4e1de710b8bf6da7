"""Optional experiment trackers; the JSON-lines logs are always written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.secrets import hide_secrets
from dare.core.yaml_text import load_yaml


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        module = _import("torch.utils.tensorboard", "log.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        module = _import("wandb", "log.wandb_project", "wandb")
        self._run = module.init(
            project=recipe.log.wandb_project,
            name=recipe.name,
            dir=str(run_dir),
            config=load_yaml(hide_secrets(recipe.dump_yaml())),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def build_trackers(recipe: Recipe, run_dir: Path) -> list[Tracker]:
    """The trackers that the recipe asks for. Raises DareError if one is not installed."""
    trackers: list[Tracker] = []
    if recipe.log.tensorboard:
        trackers.append(_TensorBoard(run_dir))
    if recipe.log.wandb_project is not None:
        trackers.append(_WandB(recipe, run_dir))
    return trackers


def _import(module: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DareError(
            f"{key} is set, but the package is not installed", fix=f"pip install 'dare-dllm[{extra}]', or remove {key}"
        ) from None
