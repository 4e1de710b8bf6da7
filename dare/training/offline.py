"""The loop over dataset rows: supervised fine-tuning, and preference optimisation in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dare.algorithms.base import Algorithm
from dare.core.engine import Engine
from dare.core.rng import Key, stable_id
from dare.core.types import Samples
from dare.data.order import Stream, batch_at
from dare.data.rows import EncodedRow, PreferencePair
from dare.tasks.base import Task
from dare.training.online import evaluate_held_out
from dare.training.session import Session
from dare.training.update import plan_iterations, update


def run_offline(
    session: Session,
    engine: Engine,
    algorithm: Algorithm[Any],
    examples: Stream[EncodedRow | PreferencePair],
    task: Task[Any] | None,
    tokenizer: Any,
) -> None:
    """Train on `examples` from `session.first_step` to the end; held-out solve rates if there is a task."""
    recipe, key = session.recipe, Key(session.recipe.seed)
    if session.first_step == 0 and recipe.evaluation.at_start and task is not None:
        evaluate_held_out(session, engine, task, tokenizer, step=0)
    for step in range(session.first_step + 1, recipe.train.steps + 1):
        with session.phase("data"):
            batch = batch_at(examples, recipe.train.batch_size, step - 1)
        with session.phase("update"):
            progress = (step - 1) / recipe.train.steps
            block_length = algorithm.block_length(progress) or recipe.decode.block_length
            samples = rows_to_samples(engine, batch, block_length, progress)
            views_key = key.fold("views") if algorithm.has_fixed_views else key.fold("views", step)
            (iteration,) = plan_iterations(engine, algorithm, samples, views_key, num=1)
            metrics = update(engine, algorithm, samples, iteration)
            engine.publish()
        metrics["padding"] = 1.0 - float(samples.canvas.is_real_BS.float().mean())
        session.record_step(step, metrics, num_tokens=int(samples.is_scored_BS.sum()))
        if session.is_due(recipe.evaluation.every, step) and task is not None:
            evaluate_held_out(session, engine, task, tokenizer, step)
        if session.is_due(recipe.checkpoint.every, step):
            session.save(step, engine, tokenizer)


def rows_of(example: EncodedRow | PreferencePair) -> tuple[EncodedRow, ...]:
    """The example's own row, or both sides of a pair, the chosen one first."""
    return (example.chosen, example.rejected) if isinstance(example, PreferencePair) else (example,)


def rows_to_samples(
    engine: Engine, examples: Sequence[EncodedRow | PreferencePair], block_length: int | None, progress: float = 0.0
) -> Samples:
    """Lay the rows out as canvases; what carries loss is the row's own decision.

    A pair becomes two rows of one group, the chosen one (reward 1) first.
    """
    groups = [rows_of(example) for example in examples]
    rows = [row for group in groups for row in group]
    is_paired = len(rows) > len(groups)
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
        reward_B=torch.tensor([1.0, 0.0]).repeat(len(groups)) if is_paired else None,
        progress=progress,
    )
