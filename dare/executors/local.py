"""The seven verbs in one process, on the CPU or one GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

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
from dare.executors.compiled import compile_network
from dare.families.base import Family
from dare.families.build import build_family
from dare.families.critic import Critic
from dare.families.flops import training_flops
from dare.families.layers.moe import ExpertLoad
from dare.families.network import Network
from dare.families.predict import target_argmax
from dare.families.weights import load_weights, save_family
from dare.rollout.engine import denoise
from dare.rollout.tree import grow_trees
from dare.training.micro_batches import forwards
from dare.training.optim import Optimizer

_FIRST = torch.tensor([0])


class LocalEngine:
    """One family, its optimizer and, if asked for, a reference policy and a critic of its own.

    The reference is a frozen copy; of a family with an adapter it is the family itself with the adapter off.
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
        prepare: Callable[[Network], object] | None = None,
    ) -> None:
        """`prepare` is called with every network before the optimizers take its parameters."""
        self.family = family
        self.train_recipe = recipe.train
        self.gradient_factor = 1.0
        family.network.recompute = recipe.train.recompute
        self.needs_reference = needs_reference
        self.reference = copy.deepcopy(family) if needs_reference and family.adapter is None else None
        if self.reference is not None:
            self.reference.network.requires_grad_(False)
        self.critic = Critic(family) if critic_lr is not None else None
        if prepare is not None:
            for network in self.networks():
                prepare(network)
        self.optimizer = Optimizer(family.network.named_parameters(), recipe.optimizer, num_updates)
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
    def create(cls, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None = None) -> Self:
        """The engine of a recipe: its checkpoint loaded, or its new model with keyed initial weights."""
        family = build_family(recipe.model, tokenizer, Key(recipe.seed), recipe.lora)
        num_updates = recipe.train.steps * recipe.train.updates_per_rollout
        return cls(recipe, family, num_updates=num_updates, needs_reference=needs_reference, critic_lr=critic_lr)

    def networks(self) -> list[Network]:
        """The networks of the policy, the reference and the critic, as far as there are any."""
        families = [self.family, self.reference, self.critic.family if self.critic is not None else None]
        return [family.network for family in families if family is not None]

    @property
    def is_packed(self) -> bool:
        """Whether views are laid end to end instead of padded."""
        return self.train_recipe.pack_length is not None

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
        num_alternatives: int = 0,
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
            num_alternatives=num_alternatives,
            on_progress=on_progress,
        )

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False, role: Role = "policy") -> Tensor:
        parts = self._micro_batches(torch.arange(views.num_views), views, samples)
        return self.score_parts(views, samples.canvas, parts, is_reference=is_reference, role=role)

    def predict(self, views: Views, samples: Samples) -> Tensor:
        return self.predict_parts(
            views, samples.canvas, self._micro_batches(torch.arange(views.num_views), views, samples)
        )

    def accumulate(
        self,
        views: Views,
        samples: Samples,
        grad_RS: Tensor,
        *,
        auxiliary: AuxLoss | None = None,
        role: Role = "policy",
    ) -> Tensor:
        run_R = replayed_rows(grad_RS, auxiliary)
        if role == "policy":
            self.flops_of_step += training_flops(self.family, *_rows(views, samples.canvas, run_R))
        parts = self._micro_batches(run_R, views, samples)
        return self.replay_parts(views, samples.canvas, grad_RS, parts, auxiliary=auxiliary, role=role)

    def score_parts(
        self, views: Views, canvas: Canvas, parts: list[Tensor], *, is_reference: bool = False, role: Role = "policy"
    ) -> Tensor:
        """`score` of the views that `parts` name, one forward per part; 0 elsewhere.

        An empty part is a forward of the first view that counts for nothing: processes that hold shards of one
        network have to forward equally often.
        """
        score_RS = torch.zeros(views.noisy_RS.shape)
        with torch.no_grad(), self._policy(is_reference) as family:
            for part in parts:
                chosen, rows = _rows(views, canvas, part if len(part) else _FIRST)
                if role == "policy":
                    found = family.view_logp(chosen, rows, is_packed=self.is_packed)
                else:
                    found = self._critic().view_value(chosen, rows)
                if len(part):
                    score_RS[part] = found.cpu()
        return score_RS

    def predict_parts(self, views: Views, canvas: Canvas, parts: list[Tensor]) -> Tensor:
        """`predict` of the views that `parts` name, as `score_parts`."""
        token_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.int64)
        with torch.no_grad():
            for part in parts:
                chosen, rows = _rows(views, canvas, part if len(part) else _FIRST)
                hidden_RTD = self.family.view_hidden(
                    chosen, rows, is_packed=self.is_packed, is_read_RS=chosen.is_target_RS
                )
                if len(part):
                    token_RS[part] = target_argmax(self.family, hidden_RTD, chosen).cpu()
        return token_RS

    def replay_parts(
        self,
        views: Views,
        canvas: Canvas,
        grad_RS: Tensor,
        parts: list[Tensor],
        *,
        auxiliary: AuxLoss | None = None,
        role: Role = "policy",
    ) -> Tensor:
        """`accumulate` of the views that `parts` name, one forward and backward per part, empty ones as in
        `score_parts`; NaN elsewhere."""
        self.family.packs.drop()  # room for activations; the update outdates them anyway
        score_RS = torch.full(views.noisy_RS.shape, torch.nan)
        for part in parts:
            chosen, rows = _rows(views, canvas, part if len(part) else _FIRST)
            terms: list[Tensor] = []
            weight_RS = grad_RS[part] if len(part) else torch.zeros_like(grad_RS[:1])
            if role == "critic":
                score = self._critic().view_value(chosen, rows)
                total = (weight_RS.to(score.device) * score).sum()
            else:
                load = self.load_of_step if len(part) else None
                is_read_RS = _read_positions(chosen, part, auxiliary)
                hidden_RTD = self.family.view_hidden(
                    chosen, rows, load, is_packed=self.is_packed, is_read_RS=is_read_RS
                )
                total, score = self.family.target_total(hidden_RTD, chosen, weight_RS)
                if auxiliary is not None and len(part):
                    terms = self._aux_terms(hidden_RTD, chosen, auxiliary, part)
            ((total + sum(terms)) * self.gradient_factor).backward()  # type: ignore[no-untyped-call]
            if len(part):
                score_RS[part] = score.detach().cpu()
        return score_RS

    def step(self, role: Role = "policy") -> dict[str, float]:
        if role == "policy":
            load, self.load_of_step = self.load_of_step, ExpertLoad()
            flops, self.flops_of_step = self.flops_of_step, 0.0
            return {**self.optimizer.step(), **load.metrics(), **({"model_tflop": flops / 1e12} if flops else {})}
        self._critic()
        return self.critic_optimizer.step()

    def publish(self) -> None:
        self.weights_version += 1

    def save(self, directory: Path) -> None:
        save_family(self.family, directory)
        write_tensors(directory, "optimizer", self.optimizer.state())
        if self.critic is not None:
            write_tensors(directory, "critic", self.critic.state())
            write_tensors(directory, "critic_optimizer", self.critic_optimizer.state())

    def load(self, directory: Path) -> None:
        load_weights(self.family, directory)
        self.optimizer.load_state(read_tensors(directory, "optimizer", self.family.device))
        if self.critic is not None:
            self.critic.load_state(read_tensors(directory, "critic", self.family.device))
            state = read_tensors(directory, "critic_optimizer", self.family.device)
            self.critic_optimizer.load_state(state)

    def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _policy(self, is_reference: bool) -> Iterator[Family]:
        """The family whose log-probs are asked for; the reference of one with an adapter is that family without it."""
        if not is_reference:
            yield self.family
            return
        if not self.needs_reference:
            raise ValueError("this engine was built without a reference policy")
        if self.reference is not None:
            yield self.reference
            return
        adapter = self.family.adapter
        if adapter is None:
            raise ValueError("the adapter that the reference is read without has been merged")
        with adapter.off():
            yield self.family

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
        return [rows[part] for part in forwards(length_R, self.train_recipe)]


def write_tensors(directory: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a file of the trainer's state into a checkpoint. Raises DareError if it cannot be written."""
    path = directory / "trainer" / f"{name}.safetensors"
    try:
        save_file(tensors, path)
    except (SafetensorError, OSError) as error:
        what = f"the {name.replace('_', ' ')} state cannot be written"
        raise DareError(what, where=str(path), got=str(error)) from None


def read_tensors(directory: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A file of the trainer's state in a checkpoint. Raises DareError if it cannot be read."""
    path = directory / "trainer" / f"{name}.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        what = f"the {name.replace('_', ' ')} state cannot be read"
        raise DareError(what, where=str(path), got=str(error)) from None
    return tensors


def replayed_rows(grad_RS: Tensor, auxiliary: AuxLoss | None) -> Tensor:
    """int64: the views that a backward has to run, ascending: a gradient somewhere, or an auxiliary term."""
    is_run_R = (grad_RS != 0).any(-1)
    if auxiliary is not None:
        is_run_R[auxiliary.view_A] = True
    return is_run_R.nonzero()[:, 0]


def _read_positions(views: Views, part: Tensor, auxiliary: AuxLoss | None) -> Tensor:
    """bool [R, S]: where the states of the views `part` are read: at targets, and where the auxiliary loss looks."""
    if auxiliary is None or not len(part):
        return views.is_target_RS
    is_read_RS = views.is_target_RS.clone()
    for row, view in enumerate(part.tolist()):
        is_read_RS[row, auxiliary.position_A[auxiliary.view_A == view]] = True
    return is_read_RS


def _rows(views: Views, canvas: Canvas, part: Tensor) -> tuple[Views, Canvas]:
    chosen = views.rows(part)
    return chosen, canvas.rows(chosen.sample_R)
