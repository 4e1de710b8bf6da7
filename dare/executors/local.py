"""The seven verbs in one process, on the CPU or one GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dare.core.decode import Decode
from dare.core.engine import Progress, Role
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Canvas, Samples, TraceBatch, Views
from dare.data.packing import packs
from dare.executors.compiled import compile_network
from dare.families.base import Family
from dare.families.build import build_family
from dare.families.critic import Critic
from dare.families.flops import training_flops
from dare.families.layers.moe import ExpertLoad
from dare.families.weights import load_weights, save_family
from dare.rollout.engine import denoise
from dare.rollout.tree import grow_trees
from dare.training.micro_batches import micro_batches
from dare.training.optim import Optimizer


class LocalEngine:
    """One family, its optimizer and, if asked for, a frozen copy as the reference policy and a critic of its own.

    The rollout side reads the trained weights themselves, so `publish` only counts versions.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        *,
        num_updates: int,
        needs_reference: bool,
        critic_lr: float | None = None,
    ) -> None:
        self.family = family
        self.max_views, self.max_tokens = recipe.train.micro_batch_views, recipe.train.micro_batch_tokens
        self.pack_length = recipe.train.pack_length
        family.network.recompute = recipe.train.recompute
        self.optimizer = Optimizer(family.network.named_parameters(), recipe.optimizer, num_updates)
        self.reference = copy.deepcopy(family) if needs_reference else None
        self.critic = Critic(family) if critic_lr is not None else None
        if self.critic is not None:
            critic_recipe = recipe.optimizer.model_copy(update={"lr": critic_lr})
            self.critic_optimizer = Optimizer(self.critic.named_parameters(), critic_recipe, num_updates)
            self.critic.family.network.eval()
        self.weights_version = 0
        self.load_of_step = ExpertLoad()
        self.flops_of_step = 0.0
        if recipe.train.is_compiled:
            compile_network(self.family.network)
        self.family.network.eval()  # dropout off: both passes of an update must be the same function

    @classmethod
    def create(
        cls, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None = None
    ) -> LocalEngine:
        """The engine of a recipe: its checkpoint loaded, or its new model with keyed initial weights."""
        family = build_family(recipe.model, tokenizer, Key(recipe.seed))
        num_updates = recipe.train.steps * recipe.train.updates_per_rollout
        return cls(recipe, family, num_updates=num_updates, needs_reference=needs_reference, critic_lr=critic_lr)

    @property
    def is_packed(self) -> bool:
        """Whether views are laid end to end instead of padded."""
        return self.pack_length is not None

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
        *,
        has_drafts: bool = False,
        branching: tuple[int, ...] = (),
    ) -> TraceBatch:
        version = self.weights_version
        if branching:
            return grow_trees(
                self.family,
                prompts,
                decode,
                key,
                sample_ids,
                branching,
                weights_version=version,
                on_progress=on_progress,
            )
        return denoise(
            self.family,
            prompts,
            decode,
            key,
            sample_ids,
            weights_version=version,
            has_drafts=has_drafts,
            on_progress=on_progress,
        )

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False, role: Role = "policy") -> Tensor:
        if is_reference and self.reference is None:
            raise ValueError("this engine was built without a reference policy")
        family = self.reference if is_reference and self.reference is not None else self.family
        score_RS = torch.zeros(views.noisy_RS.shape)
        with torch.no_grad():
            for part in self._micro_batches(torch.arange(views.num_views), views, samples):
                chosen, canvas = _rows(views, samples, part)
                if role == "policy":
                    part_RS = family.view_logp(chosen, canvas, is_packed=self.is_packed)
                else:
                    part_RS = self._critic().view_value(chosen, canvas)
                score_RS[part] = part_RS.cpu()
        return score_RS

    def predict(self, views: Views, samples: Samples) -> Tensor:
        token_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.int64)
        with torch.no_grad():
            for part in self._micro_batches(torch.arange(views.num_views), views, samples):
                chosen, canvas = _rows(views, samples, part)
                hidden_RTD = self.family.view_hidden(chosen, canvas, is_packed=self.is_packed)
                token_RS[part] = self.family.target_argmax(hidden_RTD, chosen).cpu()
        return token_RS

    def accumulate(
        self,
        views: Views,
        samples: Samples,
        grad_RS: Tensor,
        *,
        auxiliary: AuxLoss | None = None,
        role: Role = "policy",
    ) -> Tensor:
        is_run_R = (grad_RS != 0).any(-1)
        if auxiliary is not None:
            is_run_R[auxiliary.view_A] = True
        if role == "policy":
            self.flops_of_step += training_flops(self.family, *_rows(views, samples, is_run_R.nonzero()[:, 0]))
        score_RS = torch.full(views.noisy_RS.shape, torch.nan)
        for part in self._micro_batches(is_run_R.nonzero()[:, 0], views, samples):
            chosen, canvas = _rows(views, samples, part)
            terms: list[Tensor] = []
            if role == "critic":
                score = self._critic().view_value(chosen, canvas)
                total = (grad_RS[part].to(score.device) * score).sum()
            else:
                hidden_RTD = self.family.view_hidden(chosen, canvas, self.load_of_step, is_packed=self.is_packed)
                total, score = self.family.target_total(hidden_RTD, chosen, grad_RS[part])
                if auxiliary is not None:
                    terms = self._aux_terms(hidden_RTD, chosen, auxiliary, part)
            (total + sum(terms)).backward()  # type: ignore[no-untyped-call]
            score_RS[part] = score.detach().cpu()
        return score_RS

    def step(self, role: Role = "policy") -> dict[str, float]:
        if role == "policy":
            load, self.load_of_step = self.load_of_step, ExpertLoad()
            flops, self.flops_of_step = self.flops_of_step, 0.0
            return {**self.optimizer.step(), **load.metrics(), "model_tflop": flops / 1e12}
        self._critic()
        return self.critic_optimizer.step()

    def publish(self) -> None:
        self.weights_version += 1

    def save(self, directory: Path) -> None:
        save_family(self.family, directory)
        save_file(self.optimizer.state(), directory / "trainer" / "optimizer.safetensors")
        if self.critic is not None:
            save_file(self.critic.state(), directory / "trainer" / "critic.safetensors")
            save_file(self.critic_optimizer.state(), directory / "trainer" / "critic_optimizer.safetensors")

    def load(self, directory: Path) -> None:
        load_weights(self.family, directory)
        self.optimizer.load_state(self._read(directory, "optimizer"))
        if self.critic is not None:
            self.critic.load_state(self._read(directory, "critic"))
            self.critic_optimizer.load_state(self._read(directory, "critic_optimizer"))

    def _read(self, directory: Path, name: str) -> dict[str, Tensor]:
        path = directory / "trainer" / f"{name}.safetensors"
        try:
            tensors: dict[str, Tensor] = load_file(path, device=str(self.family.device))
        except (SafetensorError, OSError) as error:
            what = f"the {name.replace('_', ' ')} state cannot be read"
            raise DareError(what, where=str(path), got=str(error)) from None
        return tensors

    def _critic(self) -> Critic:
        if self.critic is None:
            raise ValueError("this engine was built without a critic")
        return self.critic

    def _aux_terms(self, hidden_RTD: Tensor, views: Views, auxiliary: AuxLoss, part: Tensor) -> list[Tensor]:
        """The sum of the terms of the views `part`, if there are any; their values are written down."""
        place_R = torch.full((int(part.max()) + 1,), -1)
        place_R[part] = torch.arange(len(part))
        entry_A = torch.isin(auxiliary.view_A, part).nonzero()[:, 0]
        if not len(entry_A):
            return []
        view_A = place_R[auxiliary.view_A[entry_A]]
        here = replace(auxiliary, view_A=view_A, position_A=auxiliary.position_A[entry_A])
        value_A = self.family.aux_terms(hidden_RTD, views, here, entry_A)
        auxiliary.value_A[entry_A] = value_A.detach().cpu()
        return [value_A.sum()]

    def _micro_batches(self, rows: Tensor, views: Views, samples: Samples) -> list[Tensor]:
        """The views `rows` in parts of one forward each: of about equal length, or packs of so many tokens."""
        if not len(rows):
            return []
        length_R = samples.canvas.is_real_BS.sum(-1)[views.sample_R[rows]]
        if self.pack_length is not None:
            return [rows[torch.tensor(pack)] for pack in packs(length_R.tolist(), self.pack_length)]
        return [rows[part] for part in micro_batches(length_R, max_views=self.max_views, max_tokens=self.max_tokens)]


def _rows(views: Views, samples: Samples, part: Tensor) -> tuple[Views, Canvas]:
    chosen = views.rows(part)
    return chosen, samples.canvas.rows(chosen.sample_R)
