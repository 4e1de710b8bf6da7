"""The loop over dataset rows: supervised fine-tuning, and preference optimisation in the same way."""

from __future__ import annotations

from typing import Any

import torch

from dare.algorithms.base import Algorithm
from dare.core.engine import Engine
from dare.core.rng import Key, stable_id
from dare.core.types import Samples
from dare.data.order import Stream, batch_at
from dare.data.rows import EncodedRow
from dare.tasks.base import Task
from dare.training.online import evaluate_held_out
from dare.training.session import Session
from dare.training.update import plan_iterations, update


def run_offline(
    session: Session,
    engine: Engine,
    algorithm: Algorithm[Any],
    rows: Stream[EncodedRow],
    task: Task[Any] | None,
    tokenizer: Any,
) -> None:
    """Train on `rows` from `session.first_step` to the end; held-out solve rates if there is a task."""
    recipe, key = session.recipe, Key(session.recipe.seed)
    if session.first_step == 0 and recipe.evaluation.at_start and task is not None:
        evaluate_held_out(session, engine, task, tokenizer, step=0)
    for step in range(session.first_step + 1, recipe.train.steps + 1):
        with session.phase("data"):
            batch = batch_at(rows, recipe.train.batch_size, step - 1)
        with session.phase("update"):
            samples = rows_to_samples(engine, batch, recipe.decode.block_length)
            (iteration,) = plan_iterations(engine, algorithm, samples, key.fold("views", step), num=1)
            metrics = update(engine, algorithm, samples, iteration)
            engine.publish()
        metrics["padding"] = 1.0 - float(samples.canvas.is_real_BS.float().mean())
        session.record_step(step, metrics, num_tokens=int(samples.is_scored_BS.sum()))
        if session.is_due(recipe.evaluation.every, step) and task is not None:
            evaluate_held_out(session, engine, task, tokenizer, step)
        if session.is_due(recipe.checkpoint.every, step):
            session.save(step, engine, tokenizer)


def rows_to_samples(engine: Engine, rows: list[EncodedRow], block_length: int | None) -> Samples:
    """Lay the rows out as canvases; what carries loss is the row's own decision."""
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
        group_B=torch.arange(len(rows)),
        mask_id=engine.spec.mask_id,
    )
