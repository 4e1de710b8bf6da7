"""The loop over dataset rows: supervised fine-tuning, and preference optimisation in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dare.algorithms.base import Algorithm
from dare.core.engine import Engine
from dare.core.recipe import Recipe
from dare.core.rng import Key, stable_id
from dare.core.types import Samples
from dare.data.order import Stream, batch_at
from dare.data.rows import EncodedRow, Example, LabelledRow, PreferencePair
from dare.tasks.base import Task
from dare.training.online import evaluate_held_out
from dare.training.reference import ReferenceStore, check_store, score_missing
from dare.training.session import Session
from dare.training.update import draw_views, plan_iterations, update


def run_offline(
    session: Session,
    engine: Engine,
    algorithm: Algorithm[Any],
    examples: Stream[Example],
    task: Task[Any] | None,
    tokenizer: Any,
) -> None:
    """Train on `examples` from `session.first_step` to the end; held-out solve rates if there is a task."""
    recipe = session.recipe
    rows = _Rows(recipe, engine, algorithm, examples)
    store = _reference_store(session, engine, algorithm, rows)
    if session.first_step == 0 and recipe.evaluation.at_start and task is not None:
        evaluate_held_out(session, engine, task, tokenizer, step=0)
    for step in range(session.first_step + 1, recipe.train.steps + 1):
        with session.phase("data"):
            samples, key = rows.at(step)
        with session.phase("update"):
            stored = None if store is None else store.read
            (iteration,) = plan_iterations(engine, algorithm, samples, key, num=1, stored=stored)
            metrics = update(engine, algorithm, samples, iteration)
            engine.publish()
        metrics["padding"] = 1.0 - float(samples.canvas.is_real_BS.float().mean())
        session.record_step(step, metrics, num_tokens=int(samples.is_scored_BS.sum()))
        if session.is_due(recipe.evaluation.every, step) and task is not None:
            evaluate_held_out(session, engine, task, tokenizer, step)
        if session.is_due(recipe.checkpoint.every, step):
            session.save(step, engine, tokenizer)
    if store is not None:
        store.close()


class _Rows:
    """The rows of every step, laid out, and the key of their views: a pure function of the step (1-based)."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        algorithm: Algorithm[Any],
        examples: Stream[Example],
    ) -> None:
        self._recipe = recipe
        self._engine = engine
        self._algorithm = algorithm
        self._examples = examples

    def at(self, step: int) -> tuple[Samples, Key]:
        recipe, key = self._recipe, Key(self._recipe.seed)
        progress = (step - 1) / recipe.train.steps
        block_length = self._algorithm.block_length(progress) or recipe.decode.block_length
        batch = batch_at(self._examples, recipe.train.batch_size, step - 1)
        samples = rows_to_samples(self._engine, batch, block_length, progress)
        return samples, key.fold("views") if self._algorithm.has_fixed_views else key.fold("views", step)


def _reference_store(session: Session, engine: Engine, algorithm: Algorithm[Any], rows: _Rows) -> ReferenceStore | None:
    """The stored log-probs of all steps, complete; None if the reference is live.

    Before the first step the policy is the reference, so it scores what the file does not have; what it has is compared
    on the first batch. A resumed run only reads.
    """
    recipe = session.recipe
    if recipe.reference.mode == "live":
        return None
    path = Path(recipe.reference.path) if recipe.reference.path else session.run_dir / "reference.sqlite"
    store = ReferenceStore(path, identity=_identity(recipe))
    if session.first_step > 0:
        return store
    with session.phase("reference"):
        for step in range(1, recipe.train.steps + 1):
            samples, key = rows.at(step)
            views = draw_views(engine, algorithm, samples, key.fold(0))
            score_missing(store, engine, views, samples)
            if step == 1:
                check_store(store, engine, views, samples, recipe.model.dtype)
    return store


def _identity(recipe: Recipe) -> str:
    """Which model a run starts from, in words."""
    model = recipe.model
    source = model.path if model.create is None else f"new {model.create.model_dump_json()}, seed {recipe.seed}"
    return f"{source} ({model.dtype})"


def rows_to_samples(
    engine: Engine, examples: Sequence[Example], block_length: int | None, progress: float = 0.0
) -> Samples:
    """Lay the rows out as canvases; what carries loss is the row's own decision.

    An example is a group: a row, or both sides of a pair, the chosen one first. Preferences become rewards, 1 or 0.
    """
    groups = [_sides(example) for example in examples]
    rows = [row for group in groups for row, _ in group]
    rewards = [reward for group in groups for _, reward in group if reward is not None]
    canvas = engine.canvas([row.prompt_ids for row in rows], [row.completion_ids for row in rows], block_length)
    is_scored_BS = torch.zeros_like(canvas.is_real_BS)
    for index, row in enumerate(rows):
        start = len(row.prompt_ids)
        is_scored_BS[index, start : start + len(row.is_scored)] = torch.tensor(row.is_scored, dtype=torch.bool)
    return Samples(
        canvas=canvas,
        is_scored_BS=is_scored_BS,
        sample_id_B=torch.tensor([stable_id(row.uid) for row in rows]),
        advantage_B=torch.zeros(len(rows)),
        group_B=torch.tensor([index for index, group in enumerate(groups) for _ in group]),
        mask_id=engine.spec.mask_id,
        eos_ids=engine.spec.eos_ids,
        reward_B=torch.tensor(rewards) if rewards else None,
        progress=progress,
    )


def _sides(example: Example) -> list[tuple[EncodedRow, float | None]]:
    if isinstance(example, PreferencePair):
        return [(example.chosen, 1.0), (example.rejected, 0.0)]
    if isinstance(example, LabelledRow):
        return [(example.row, float(example.is_good))]
    return [(example, None)]
