"""Held-out loss: the same rows under the same masks every time, so that two validations differ by the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dare.core.data_recipe import DataRecipe, MixedSource
from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import Samples
from dare.core.validation_recipe import ValidationRecipe
from dare.data.read import Tally, load_source
from dare.data.rows import EncodedRow
from dare.diffusion import corrupt, likelihood
from dare.tasks.base import Task
from dare.training.data import encode_rows, task_rows
from dare.training.noise import nll_by_noise


@dataclass(frozen=True)
class Standing:
    """Where a run is: the lowest validation loss so far, its step, and how many validations have passed since."""

    best_step: int
    best_loss: float
    num_since: int


def standing(records: list[dict[str, Any]], min_delta: float) -> Standing | None:
    """A pure function of the validation log, so a resumed run knows it; None before the first validation."""
    best: Standing | None = None
    for record in records:
        loss, step = float(record["nll_per_token"]), int(record["step"])
        if best is None or loss < best.best_loss - min_delta:
            best = Standing(step, loss, 0)
        else:
            best = Standing(best.best_step, best.best_loss, best.num_since + 1)
    return best


def is_out_of_patience(records: list[dict[str, Any]], options: ValidationRecipe | None) -> bool:
    """Whether training should have stopped by the validations so far."""
    if options is None or options.patience is None:
        return False
    now = standing(records, options.min_delta)
    return now is not None and now.num_since >= options.patience


def validation_rows(recipe: Recipe, task: Task[Any] | None, tokenizer: Any, spec: FamilySpec) -> list[EncodedRow]:
    """The held-out rows of a recipe, encoded as its training rows are; [] without `validation`.

    Raises DareError if there is neither a path nor a task, or a row cannot be read or encoded.
    """
    options = recipe.validation
    if options is None:
        return []
    data = recipe.data or DataRecipe()
    if options.path is not None:
        source = MixedSource(path=options.path, split=options.split, format=data.format, columns=data.columns)
        rows = list(load_source(data, source, Tally(), "validation"))[: options.num_rows]
    elif task is not None:
        rows = list(task_rows(task, "eval", options.num_rows))
    else:
        raise DareError("there are no held-out rows", where="validation.path", got="none", fix="give a path, or a task")
    return encode_rows(tokenizer, rows, data, recipe.decode, spec)


def validate(engine: Engine, batches: Iterable[Samples], key: Key, num_masks: int) -> dict[str, Any]:
    """The negative ELBO per scored token of the samples, nats, with its standard error over them, and by noise level.

    Every sample is masked `num_masks` times; the counts of masked tokens are a grid over all counts (`exact_count`),
    and masks are keyed by (`key`, sample, mask). So the numbers repeat bit for bit, and the difference of two
    validations has none of the noise of a training loss. Block models: the sum over blocks.
    """
    loss_B, count_B, by_noise = [], [], []
    for samples in batches:
        views = corrupt.exact_count(samples, key, num_views=num_masks)
        logp_RS = engine.score(views, samples)
        elbo_B = likelihood.per_sequence(logp_RS, views.weight_RS, views.sample_R, samples.canvas.batch_size)
        loss_B.append(-elbo_B.double())
        count_B.append(samples.is_scored_BS.sum(-1))
        by_noise.append(nll_by_noise(logp_RS, views, samples))
    total_B, num_B = torch.cat(loss_B), torch.cat(count_B)
    mean = float(total_B.sum() / num_B.sum())
    # Of a ratio of sums: the spread of what rows add beyond the mean of their tokens.
    spread = float((total_B - mean * num_B).square().sum().sqrt() / num_B.sum())
    levels = {
        name: sum(found[name].total for found in by_noise if name in found)
        / sum(found[name].count for found in by_noise if name in found)
        for name in sorted({name for found in by_noise for name in found})
    }
    return {"nll_per_token": mean, "standard_error": spread, "perplexity": math.exp(min(mean, 700.0)), **levels}
