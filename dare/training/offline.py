"""The loop over dataset rows: supervised fine-tuning, and preference optimisation in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from dare.diffusion.trace import to_completions
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import token_piece
from dare.tasks.base import Task
from dare.training.online import evaluate_held_out
from dare.training.reference import ReferenceStore, check_store, score_missing
from dare.training.session import Session
from dare.training.update import draw_views, plan_iterations, update
from dare.training.validation import validate

_NUM_SHOWN = 4  # completions that are decoded to be looked at


def run_offline(
    session: Session,
    engine: Engine,
    algorithm: Algorithm[Any],
    examples: Stream[Example],
    task: Task[Any] | None,
    tokenizer: Any,
    held_out: Sequence[EncodedRow] = (),
) -> None:
    """Train on `examples` from `session.first_step` to the end.

    Beside it: the loss on `held_out`, which may end training; solve rates if there is a task; completions to look at.
    """
    recipe = session.recipe
    rows = _Rows(recipe, engine, algorithm, examples)
    store = _reference_store(session, engine, algorithm, rows)
    if session.first_step == 0 and recipe.evaluation.at_start and task is not None:
        evaluate_held_out(session, engine, task, tokenizer, step=0)
    shown = held_out or rows.some()
    if session.first_step == 0:
        _validate(session, engine, held_out, tokenizer, step=0)
    for step in session.steps():
        with session.phase("data"):
            samples, key = rows.at(step)
        with session.phase("update"):
            stored = None if store is None else store.read
            (iteration,) = plan_iterations(engine, algorithm, samples, key, num=1, stored=stored)
            metrics = update(engine, algorithm, samples, iteration)
            engine.publish()
        metrics["padding"] = 1.0 - float(samples.canvas.is_real_BS.float().mean())
        session.record_step(step, metrics, num_tokens=int(samples.is_scored_BS.sum()))
        if recipe.validation is not None and session.is_due(recipe.validation.every, step):
            _validate(session, engine, held_out, tokenizer, step)
        if session.is_due(recipe.log.samples_every, step):
            _show_completions(session, engine, shown, tokenizer, step)
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

    def some(self) -> list[EncodedRow]:
        """The first rows of the run."""
        return [_sides(example)[0][0] for example in batch_at(self._examples, _NUM_SHOWN, 0)]


def _validate(session: Session, engine: Engine, held_out: Sequence[EncodedRow], tokenizer: Any, step: int) -> None:
    """The loss on held-out rows; the weights with the lowest so far are kept if the recipe says so."""
    recipe, options = session.recipe, session.recipe.validation
    if options is None:
        return
    size, block_length = recipe.train.batch_size, recipe.decode.block_length

    def batches() -> Iterator[Samples]:
        for start in range(0, len(held_out), size):
            session.watchdog.beat()
            yield rows_to_samples(engine, held_out[start : start + size], block_length)

    with session.phase("validate"):
        result = validate(engine, batches(), Key(recipe.seed).fold("validation"), options.num_masks)
    session.record_validation(step, result)
    if options.is_best_kept and session.standing is not None and session.standing.best_step == step:
        session.save_best(step, engine, tokenizer)


def _show_completions(session: Session, engine: Engine, rows: Sequence[EncodedRow], tokenizer: Any, step: int) -> None:
    """Decode the prompts of a few rows as the recipe decodes; those that leave no room for an answer are left out."""
    recipe, spec = session.recipe, engine.spec
    longest = spec.max_length - recipe.decode.gen_length - spec.block_length
    shown = [row for row in rows[:_NUM_SHOWN] if 0 < len(row.prompt_ids) <= longest]
    if not shown:
        return
    session.enter("samples")
    prompts, ids = [row.prompt_ids for row in shown], [stable_id(row.uid) for row in shown]
    trace = engine.generate(prompts, recipe.decode, Key(recipe.seed).fold("samples"), ids)
    records = []
    for row, completion in zip(shown, to_completions(trace), strict=True):
        records.append(
            {
                "split": "shown",
                "uid": row.uid,
                "prompt": decode_text(tokenizer, row.prompt_ids, has_special=True),
                "completion": decode_text(tokenizer, completion.tokens),
                "reference": decode_text(tokenizer, row.completion_ids),
                "finish": completion.finish,
                "nfe": completion.nfe,
                "tokens": [token_piece(tokenizer, token) for token in completion.tokens],
                "step_map": completion.step_map,
                "logp": [round(value, 4) for value in completion.logp],
            }
        )
    session.record_samples(step, records)
    session.reporter.samples([(str(record["prompt"]), str(record["completion"]), {}) for record in records])


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
            session.watchdog.beat()
            samples, key = rows.at(step)
            views = draw_views(engine, algorithm, samples, key.fold(0))
            score_missing(store, engine, views, samples)
            if step == 1:
                check_store(store, engine, views, samples, recipe.model.dtype)
    return store


def _identity(recipe: Recipe) -> str:
    """Which model a run starts from, in words."""
    model, bits = recipe.model, None if recipe.lora is None else recipe.lora.quantize_base
    source = model.path if model.create is None else f"new {model.create.model_dump_json()}, seed {recipe.seed}"
    return f"{source} ({model.dtype}{f', base in {bits}' if bits else ''})"


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
