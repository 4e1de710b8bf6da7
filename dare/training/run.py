"""From a recipe to a finished run: build the parts, pick the loop, leave a whole run folder behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dare.algorithms.base import Algorithm
from dare.core.checks import check, check_attention
from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.data.read import Tally
from dare.families.build import family_spec
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.tasks.base import Task
from dare.training.checkpoint import resolve_model_path
from dare.training.feed import STREAMS, TextSource, text_sources
from dare.training.offline import run_offline
from dare.training.online import run_online
from dare.training.session import Reporter, Session


def train(recipe: Recipe, run_dir: Path, reporter: Reporter, *, is_resumed: bool = False) -> dict[str, Any]:
    """Run a recipe to its end in `run_dir`; returns the summary that is also in run.json.

    Raises DareError for everything that a user can put right, before the first step where possible.
    """
    recipe = with_checkpoint(recipe)
    warnings = check(recipe)
    algorithm: Algorithm[Any] = recipe.algorithm.build()
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    tally = Tally()
    has_pairs = algorithm.row_kind != "completions"
    sources = text_sources(recipe, task, tally, has_pairs=has_pairs) if algorithm.kind == "offline" else []
    tokenizer = model_tokenizer(recipe, task, sources)
    spec = family_spec(recipe.model, tokenizer)
    check_attention(recipe.algorithm.name, algorithm, spec.attention)
    algorithm = algorithm.adapted(spec)
    recipe = recipe.model_copy(update={"algorithm": recipe.algorithm.with_options(algorithm.options)})
    open_stream = STREAMS[algorithm.row_kind]
    examples = open_stream(sources, recipe, tokenizer, spec, tally) if sources else None
    is_reference_held = algorithm.needs_reference and recipe.reference.mode == "live"
    engine: Engine = recipe.executor.build().create(
        recipe, tokenizer, needs_reference=is_reference_held, critic_lr=algorithm.critic_lr
    )
    session = Session(recipe, run_dir, reporter, is_resumed=is_resumed)
    for warning in [*warnings, *tally.warnings()]:
        reporter.message(f"warning: {warning}")
    try:
        if session.resumed_from is not None:
            engine.load(session.resumed_from)
            engine.publish()
        if examples is not None:
            run_offline(session, engine, algorithm, examples, task, tokenizer)
            if recipe.data is not None and recipe.data.is_streaming:  # only now is it known
                for warning in tally.warnings():
                    reporter.message(f"warning: {warning}")
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


def with_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe with a run folder in model.path replaced by that run's newest checkpoint."""
    if recipe.model.path is None:
        return recipe
    model = recipe.model.model_copy(update={"path": resolve_model_path(recipe.model.path)})
    return recipe.model_copy(update={"model": model})


def model_tokenizer(recipe: Recipe, task: Task[Any] | None, sources: list[TextSource]) -> Any:
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
    for source in sources:
        for row in source.read(Tally()):
            alphabet.update(row.all_text())
    return char_tokenizer("".join(sorted(alphabet)))
