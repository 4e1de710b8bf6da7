"""From a recipe to a finished run: build the parts, pick the loop, leave a whole run folder behind."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from dare.algorithms.base import Algorithm
from dare.core.checks import check, check_attention
from dare.core.engine import Engine
from dare.core.errors import DareError, Interrupted
from dare.core.faults import explain_fault
from dare.core.recipe import Recipe
from dare.data.read import Tally
from dare.families.build import family_spec
from dare.families.hub import resolve_checkpoint
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.tasks.base import Task
from dare.training.checkpoint import resolve_model_path
from dare.training.feed import STREAMS, TextSource, text_sources
from dare.training.offline import run_offline
from dare.training.online import run_online
from dare.training.resume import Resume
from dare.training.session import Reporter, Session
from dare.training.stop import StopRequest, StopSignals
from dare.training.validation import validation_rows


def train(
    recipe: Recipe,
    run_dir: Path,
    reporter: Reporter,
    *,
    is_resumed: bool = False,
    is_damage_skipped: bool = False,
) -> dict[str, Any]:
    """Run a recipe to its end in `run_dir`; returns the summary that is also in run.json.

    is_resumed         continue the run that is there, if there is one, from its newest checkpoint
    is_damage_skipped  then pass over checkpoints that are damaged
    Raises DareError for everything that a user can put right, before the first step where possible; Interrupted if
    SIGINT or SIGTERM came, after a save.
    """
    resume: Resume = "never" if not is_resumed else "auto" if is_damage_skipped else "newest"
    with StopSignals(recipe.checkpoint.stop_within_s) as stop:
        return _train(with_checkpoint(recipe), run_dir, reporter, resume, stop)


def _train(recipe: Recipe, run_dir: Path, reporter: Reporter, resume: Resume, stop: StopSignals) -> dict[str, Any]:
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
    held_out = validation_rows(recipe, task, tokenizer, spec)
    is_reference_held = algorithm.needs_reference and recipe.reference.mode == "live"
    engine: Engine = recipe.executor.build().create(
        recipe, tokenizer, needs_reference=is_reference_held, critic_lr=algorithm.critic_lr
    )
    session = Session(recipe, run_dir, reporter, resume=resume, stop=stop)
    for warning in [*warnings, *tally.warnings()]:
        reporter.message(f"warning: {warning}")
    try:
        with stop.deferred(), session.watchdog:
            try:
                if session.resumed_from is not None:
                    engine.load(session.resumed_from)
                    engine.publish()
                if examples is not None:
                    run_offline(session, engine, algorithm, examples, task, tokenizer, held_out)
                elif task is not None:
                    run_online(session, engine, algorithm, task, tokenizer)
            except StopRequest:
                _stop(session, engine, tokenizer, stop)
    except KeyboardInterrupt:
        session.close("stopped")
        raise
    except Exception as error:
        fault = explain_fault(error, where=session.place)
        session.close("failed", error=str(fault or error))
        if fault is not None:
            raise fault from error
        raise
    finally:
        engine.close()
    if recipe.data is not None and recipe.data.is_streaming:  # only now is it known
        for warning in tally.warnings():
            reporter.message(f"warning: {warning}")
    return session.close("finished", checkpoint=resolve_model_path(str(run_dir)))


def _stop(session: Session, engine: Engine, tokenizer: Any, stop: StopSignals) -> None:
    """Save what is done and end. Raises Interrupted."""
    saved = session.save_done(engine, tokenizer)
    what = "nothing was done yet that could be saved" if saved is None else f"step {saved} is saved"
    raise Interrupted(stop.received or signal.SIGINT, what)


def with_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe with a run folder in model.path replaced by that run's newest checkpoint."""
    if recipe.model.path is None:
        return recipe
    model = recipe.model.model_copy(update={"path": resolve_model_path(recipe.model.path)})
    return recipe.model_copy(update={"model": model})


def model_tokenizer(recipe: Recipe, task: Task[Any] | None, sources: list[TextSource]) -> Any:
    """The checkpoint's tokenizer; for a new model one token per character of the task or of the data."""
    if recipe.model.path is not None:
        tokenizer = load_tokenizer(resolve_checkpoint(recipe.model.path))
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
