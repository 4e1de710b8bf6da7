"""The seven verbs in one process, on the CPU or one GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dare.core.decode import Decode
from dare.core.engine import Progress
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import Canvas, Samples, TraceBatch, Views
from dare.families.base import Family
from dare.families.build import build_family
from dare.families.layers.moe import ExpertLoad
from dare.families.weights import load_weights, save_family
from dare.rollout.engine import denoise
from dare.training.optim import Optimizer


class LocalEngine:
    """One family, its optimizer and, if asked for, a frozen copy as the reference policy.

    The rollout side reads the trained weights themselves, so `publish` only counts versions.
    """

    def __init__(self, recipe: Recipe, family: Family, *, num_updates: int, needs_reference: bool) -> None:
        self.family = family
        self.micro_batch_views = recipe.train.micro_batch_views
        self.optimizer = Optimizer(family.network.named_parameters(), recipe.optimizer, num_updates)
        self.reference = copy.deepcopy(family) if needs_reference else None
        self.weights_version = 0
        self.load_of_step = ExpertLoad()
        self.family.network.eval()  # dropout off: both passes of an update must be the same function

    @classmethod
    def create(cls, recipe: Recipe, tokenizer: Any, *, needs_reference: bool) -> LocalEngine:
        """The engine of a recipe: its checkpoint loaded, or its new model with keyed initial weights."""
        family = build_family(recipe.model, tokenizer, Key(recipe.seed))
        num_updates = recipe.train.steps * recipe.train.updates_per_rollout
        return cls(recipe, family, num_updates=num_updates, needs_reference=needs_reference)

    @property
    def spec(self) -> FamilySpec:
        return self.family.spec

    def canvas(self, prompts: list[list[int]], completions: list[list[int]], block_length: int | None) -> Canvas:
        return self.family.canvas(prompts, completions, block_length)

    def generate(
        self,
        prompts: list[list[int]],
        decode: Decode,
        key: Key,
        sample_ids: list[int],
        on_progress: Progress | None = None,
    ) -> TraceBatch:
        version = self.weights_version
        return denoise(self.family, prompts, decode, key, sample_ids, weights_version=version, on_progress=on_progress)

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False) -> Tensor:
        family = self.family
        if is_reference:
            if self.reference is None:
                raise ValueError("this engine was built without a reference policy")
            family = self.reference
        logp_RS = torch.zeros(views.noisy_RS.shape)
        with torch.no_grad():
            for part in self._micro_batches(torch.arange(views.num_views)):
                logp_RS[part] = self._view_logp(family, views, samples, part).cpu()
        return logp_RS

    def accumulate(self, views: Views, samples: Samples, grad_RS: Tensor) -> Tensor:
        logp_RS = torch.full(views.noisy_RS.shape, torch.nan)
        for part in self._micro_batches((grad_RS != 0).any(-1).nonzero()[:, 0]):
            logp = self._view_logp(self.family, views, samples, part, self.load_of_step)
            (grad_RS[part].to(logp.device) * logp).sum().backward()  # type: ignore[no-untyped-call]
            logp_RS[part] = logp.detach().cpu()
        return logp_RS

    def step(self) -> dict[str, float]:
        load, self.load_of_step = self.load_of_step, ExpertLoad()
        return {**self.optimizer.step(), **load.metrics()}

    def publish(self) -> None:
        self.weights_version += 1

    def save(self, directory: Path) -> None:
        save_family(self.family, directory)
        save_file(self.optimizer.state(), directory / "trainer" / "optimizer.safetensors")

    def load(self, directory: Path) -> None:
        load_weights(self.family, directory)
        path = directory / "trainer" / "optimizer.safetensors"
        try:
            state = load_file(path, device=str(self.family.device))
        except (SafetensorError, OSError) as error:
            raise DareError("the optimizer state cannot be read", where=str(path), got=str(error)) from None
        self.optimizer.load_state(state)

    def _view_logp(
        self, family: Family, views: Views, samples: Samples, part: Tensor, load: ExpertLoad | None = None
    ) -> Tensor:
        chosen = views.rows(part)
        return family.view_logp(chosen, samples.canvas.rows(chosen.sample_R), load)

    def _micro_batches(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows, self.micro_batch_views)) if len(rows) else []
