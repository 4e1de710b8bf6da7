"""From a recipe to a finished run: build the parts, pick the loop, leave a whole run folder behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dare.algorithms.base import Algorithm
from dare.core.checks import check, check_attention
from dare.core.data_recipe import DataRecipe
from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.spec import FamilySpec
from dare.families.build import family_spec
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.tasks.base import Task
from dare.training.checkpoint import resolve_model_path
from dare.training.data import EncodedRow, Row, encode_rows, load_rows, task_rows
from dare.training.offline import run_offline
from dare.training.online import run_online
from dare.training.session import Reporter, Session


def train(recipe: Recipe, run_dir: Path, reporter: Reporter, *, is_resumed: bool = False) -> dict[str, Any]:
    """Run a recipe to its end in `run_dir`; returns the summary that is also in run.json.

    Raises DareError for everything that a user can put right, before the first step where possible.
    """
    recipe = _with_checkpoint(recipe)
    warnings = check(recipe)
    algorithm: Algorithm[Any] = recipe.algorithm.build()
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    raw_rows = _raw_rows(recipe, task) if algorithm.kind == "offline" else []
    tokenizer = _tokenizer(recipe, task, raw_rows)
    rows = _encode(recipe, raw_rows, tokenizer, family_spec(recipe.model, tokenizer)) if raw_rows else []
    check_attention(recipe.algorithm.name, algorithm, family_spec(recipe.model, tokenizer).attention)
    engine: Engine = recipe.executor.build().create(
        recipe, tokenizer, needs_reference=algorithm.needs_reference, critic_lr=algorithm.critic_lr
    )
    session = Session(recipe, run_dir, reporter, is_resumed=is_resumed)
    if len(rows) < len(raw_rows):
        warnings.append(f"{len(raw_rows) - len(rows)} of {len(raw_rows)} rows are too long and were dropped")
    for warning in warnings:
        reporter.message(f"warning: {warning}")
    try:
        if session.resumed_from is not None:
            engine.load(session.resumed_from)
            engine.publish()
        if algorithm.kind == "offline":
            run_offline(session, engine, algorithm, rows, task, tokenizer)
        elif task is not None:
            run_online(session, engine, algorithm, task, tokenizer)
    except KeyboardInterrupt:
        session.close("stopped")
        raise
    except Exception as error:
        session.close("failed", error=str(error))
        raise
    finally:
        engine.close()
    return session.close("finished", checkpoint=resolve_model_path(str(run_dir)))


def training_rows(recipe: Recipe) -> tuple[Any, list[EncodedRow]]:
    """The tokenizer and the rows that an offline recipe trains on, without loading any weights."""
    recipe = _with_checkpoint(recipe)
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    raw_rows = _raw_rows(recipe, task)
    tokenizer = _tokenizer(recipe, task, raw_rows)
    return tokenizer, _encode(recipe, raw_rows, tokenizer, family_spec(recipe.model, tokenizer))


def _with_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe with a run folder in model.path replaced by that run's newest checkpoint."""
    if recipe.model.path is None:
        return recipe
    model = recipe.model.model_copy(update={"path": resolve_model_path(recipe.model.path)})
    return recipe.model_copy(update={"model": model})


def _raw_rows(recipe: Recipe, task: Task[Any] | None) -> list[Row]:
    """Dataset rows, or the task's own problems and answers."""
    data = recipe.data or DataRecipe()
    if data.path is not None:
        return load_rows(data)
    if task is None:
        raise DareError("there is nothing to train on", expected="data.path or a task", fix="add one to the recipe")
    return task_rows(task)


def _tokenizer(recipe: Recipe, task: Task[Any] | None, rows: list[Row]) -> Any:
    """The checkpoint's tokenizer; for a new model one token per character of the task or of the data."""
    if recipe.model.path is not None:
        tokenizer = load_tokenizer(recipe.model.path)
        if tokenizer is None:
            raise DareError(
                "the checkpoint has no tokenizer",
                where=recipe.model.path,
                fix="copy tokenizer.json and tokenizer_config.json of the model into the folder",
            )
        return tokenizer
    alphabet = set(task.alphabet) if task else set()
    for row in rows:
        alphabet.update(row.all_text())
    return char_tokenizer("".join(sorted(alphabet)))


def _encode(recipe: Recipe, rows: list[Row], tokenizer: Any, spec: FamilySpec) -> list[EncodedRow]:
    return encode_rows(tokenizer, rows, recipe.data or DataRecipe(), recipe.decode, spec)
