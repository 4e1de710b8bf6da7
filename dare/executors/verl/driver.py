"""The seven verbs over verl's workers: batches are cut into one part per worker and the results put together.

The loops, algorithms, rewards and logs stay in this process. What travels is data: prompts and traces, views and
log-probs, gradients of the loss with respect to log-probs. Results do not depend on the number of workers, up to the
rounding of float32 sums.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.core.engine import Progress, Role
from dare.core.errors import DareError
from dare.core.recipe import Recipe, TrainRecipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Canvas, Samples, TraceBatch, Views
from dare.executors.choices import VerlOptions
from dare.executors.local import replayed_rows
from dare.executors.verl.split import Shard, auxiliary_of, make_shards, split_groups, split_rows
from dare.families.base import Family
from dare.families.build import outline
from dare.families.flops import training_flops
from dare.rollout.join import join_traces
from dare.rollout.plan import check_prompts, make_plan
from dare.training.micro_batches import forwards

if TYPE_CHECKING:
    from dare.executors.verl.workers import Workers


class VerlEngine:
    """Drives `workers`; `outline` is the family without weights, which lays canvases out."""

    def __init__(self, outline: Family, workers: Workers, train: TrainRecipe) -> None:
        self.outline = outline
        self.workers = workers
        self.forwards = partial(forwards, train=train)
        self.weights_version = 0
        self.flops_of_step = 0.0

    @classmethod
    def create(
        cls, recipe: Recipe, tokenizer: Any, options: VerlOptions, *, needs_reference: bool, critic_lr: float | None
    ) -> VerlEngine:
        """Start the workers and build the model in each.

        Raises DareError if verl is not installed or the machine or cluster cannot hold the workers.
        """
        from dare.executors.verl.workers import start

        workers = start(recipe, tokenizer, options, needs_reference=needs_reference, critic_lr=critic_lr)
        return cls(outline(recipe.model, tokenizer, recipe.lora), workers, recipe.train)

    @property
    def spec(self) -> FamilySpec:
        return self.outline.spec

    def canvas(self, prompts: list[list[int]], completions: list[list[int]], block_length: int | None) -> Canvas:
        return self.outline.canvas(prompts, completions, block_length)

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
        if not prompts:
            raise DareError("there is no prompt to complete", got="an empty list")
        plan = make_plan(self.outline, decode)
        check_prompts(self.outline, prompts)
        layout = self.outline.empty_canvas(prompts, decode.gen_length, plan.block_length)
        parts = split_groups(len(prompts), self.workers.num, math.prod(branching))
        found = self.workers.each(
            "generate",
            [[prompts[row] for row in part] for part in parts],
            [decode] * self.workers.num,
            [key] * self.workers.num,
            [[sample_ids[row] for row in part] for part in parts],
            [has_drafts] * self.workers.num,
            [branching] * self.workers.num,
            [num_alternatives] * self.workers.num,
        )
        trace = join_traces([part for part in found if part is not None], layout, self.spec.pad_id)
        if on_progress is not None:
            num = int(trace.canvas.is_completion_BS.sum())
            on_progress(num, num)
        return trace

    def score(self, views: Views, samples: Samples, *, is_reference: bool = False, role: Role = "policy") -> Tensor:
        score_RS = torch.zeros(views.noisy_RS.shape)
        if not views.num_views:
            return score_RS
        parts, shards = self._shards(views, samples, torch.arange(views.num_views))
        found = self.workers.each("score", shards, [is_reference] * len(shards), [role] * len(shards))
        for part, score in zip(parts, found, strict=True):
            score_RS[part] = score[: len(part)]
        return score_RS

    def predict(self, views: Views, samples: Samples) -> Tensor:
        token_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.int64)
        if not views.num_views:
            return token_RS
        parts, shards = self._shards(views, samples, torch.arange(views.num_views))
        for part, token in zip(parts, self.workers.each("predict", shards), strict=True):
            token_RS[part] = token[: len(part)]
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
        score_RS = torch.full(views.noisy_RS.shape, torch.nan)
        rows = replayed_rows(grad_RS, auxiliary)
        if not len(rows):
            return score_RS
        if role == "policy":
            chosen = views.rows(rows)
            self.flops_of_step += training_flops(self.outline, chosen, samples.canvas.rows(chosen.sample_R))
        parts, shards = self._shards(views, samples, rows)
        terms = [auxiliary_of(auxiliary, part) for part in parts]
        found = self.workers.each(
            "accumulate", shards, [grad_RS[part] for part in parts], [term for term, _ in terms], [role] * len(shards)
        )
        for part, (_, entries), (score, value) in zip(parts, terms, found, strict=True):
            score_RS[part] = score[: len(part)]
            if auxiliary is not None:
                auxiliary.value_A[entries] = value
        return score_RS

    def step(self, role: Role = "policy") -> dict[str, float]:
        metrics: dict[str, float] = self.workers.each("step", [role] * self.workers.num)[0]
        if role == "policy" and self.flops_of_step:
            metrics["model_tflop"], self.flops_of_step = self.flops_of_step / 1e12, 0.0
        return metrics

    def publish(self) -> None:
        self.weights_version += 1
        self.workers.each("publish", [self.weights_version] * self.workers.num)

    def save(self, directory: Path) -> None:
        self.workers.each("save", [directory.absolute()] * self.workers.num)

    def load(self, directory: Path) -> None:
        self.workers.each("load", [directory.absolute()] * self.workers.num)

    def close(self) -> None:
        self.workers.close()

    def _shards(self, views: Views, samples: Samples, rows: Tensor) -> tuple[list[Tensor], list[Shard]]:
        parts = split_rows(rows, self.workers.num)
        return parts, make_shards(views, samples, parts, self.forwards)
