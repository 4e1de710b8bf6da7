"""From a recipe to a finished run: build the parts, pick the loop, leave a whole run folder behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare.algorithms.base import Algorithm, RowKind
from dare.core.checks import check, check_attention
from dare.core.data_recipe import DataRecipe
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.registry import resolve
from dare.core.spec import FamilySpec
from dare.families.build import family_spec
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.tasks.base import Task
from dare.training.checkpoint import resolve_model_path
from dare.training.data import EncodedRow, Row, encode_rows, load_rows, task_rows
from dare.training.offline import rows_of, run_offline
from dare.training.online import run_online
from dare.training.pairs import PairRow, PreferencePair, encode_pairs, load_pairs, task_pairs
from dare.training.session import Reporter, Session


def train(recipe: Recipe, run_dir: Path, reporter: Reporter, *, is_resumed: bool = False) -> dict[str, Any]:
    """Run a recipe to its end in `run_dir`; returns the summary that is also in run.json.

    Raises DareError for everything that a user can put right, before the first step where possible.
    """
    recipe = _with_checkpoint(recipe)
    warnings = check(recipe)
    algorithm: Algorithm[Any] = recipe.algorithm.build()
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    raw_rows = _raw_rows(recipe, task, algorithm.row_kind) if algorithm.kind == "offline" else []
    tokenizer = _tokenizer(recipe, task, raw_rows)
    rows = _encode(recipe, raw_rows, tokenizer, family_spec(recipe.model, tokenizer)) if raw_rows else []
    spec = family_spec(recipe.model, tokenizer)
    check_attention(recipe.algorithm.name, algorithm, spec.attention)
    algorithm = algorithm.adapted(spec)
    recipe = recipe.model_copy(update={"algorithm": recipe.algorithm.with_options(algorithm.options)})
    executor = resolve("executors", recipe.executor)
    engine = executor.create(
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
    return session.close("finished", checkpoint=resolve_model_path(str(run_dir)))


def training_rows(recipe: Recipe) -> tuple[Any, list[EncodedRow]]:
    """The tokenizer and the rows that an offline recipe trains on, both sides of a pair one after the other.

    No weights are loaded.
    """
    recipe = _with_checkpoint(recipe)
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    raw_rows = _raw_rows(recipe, task, recipe.algorithm.type.row_kind)
    tokenizer = _tokenizer(recipe, task, raw_rows)
    examples = _encode(recipe, raw_rows, tokenizer, family_spec(recipe.model, tokenizer))
    return tokenizer, [row for example in examples for row in rows_of(example)]


def _with_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe with a run folder in model.path replaced by that run's newest checkpoint."""
    if recipe.model.path is None:
        return recipe
    model = recipe.model.model_copy(update={"path": resolve_model_path(recipe.model.path)})
    return recipe.model_copy(update={"model": model})


def _raw_rows(recipe: Recipe, task: Task[Any] | None, kind: RowKind) -> list[Row | PairRow]:
    """Dataset rows, or the task's own problems and answers."""
    data = recipe.data or DataRecipe()
    is_paired = kind != "completions"
    if data.path is not None:
        return [*(load_pairs(data) if is_paired else load_rows(data))]
    if task is None:
        raise DareError("there is nothing to train on", expected="data.path or a task", fix="add one to the recipe")
    return [*(task_pairs(task) if is_paired else task_rows(task))]


def _tokenizer(recipe: Recipe, task: Task[Any] | None, rows: Sequence[Row | PairRow]) -> Any:
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


def _encode(
    recipe: Recipe, rows: Sequence[Row | PairRow], tokenizer: Any, spec: FamilySpec
) -> list[EncodedRow | PreferencePair]:
    data = recipe.data or DataRecipe()
    pairs = [row for row in rows if isinstance(row, PairRow)]
    if pairs:
        return [*encode_pairs(tokenizer, pairs, data, recipe.decode, spec)]
    singles = [row for row in rows if isinstance(row, Row)]
    return [*encode_rows(tokenizer, singles, data, recipe.decode, spec)]
