"""`dare.train`, `dare.convert`, `dare.evaluate`, `dare.evaluate_benchmarks`: what the command line does, in Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dare.core.decode import Decode
from dare.core.engine import Progress
from dare.core.errors import DareError
from dare.core.files import whole_directory, write_json, write_text
from dare.core.recipe import Recipe, TaskChoice, load_recipe, parse_recipe
from dare.core.recipe_errors import explain
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.evals.backend import Backend, NativeBackend
from dare.evals.benchmarks.programs import ProgramBenchmark
from dare.evals.benchmarks.table import find_benchmark
from dare.evals.presets import plan
from dare.evals.remote import HttpBackend, is_url
from dare.evals.runner import evaluate_task
from dare.evals.suite import Shard, run_benchmark
from dare.families.average import average_checkpoints
from dare.families.convert import DEFAULT_MASK_TOKEN, Shift, convert_causal
from dare.families.tokenizer import load_tokenizer
from dare.families.weights import resolve_checkpoint
from dare.model import Model, find_dtype, load
from dare.rollout.engine import denoise
from dare.sandbox.run import Sandbox
from dare.terminal.progress import NullReporter
from dare.training.checkpoint import list_checkpoints, resolve_model_path
from dare.training.run import train as run_recipe
from dare.training.session import Reporter


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    is_resumed: bool = False,
    is_damage_skipped: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run a recipe (object, plain data or YAML file) into the folder `out`, by default runs/NAME.

    is_resumed         continue the run that is in `out`, if there is one, from its newest checkpoint
    is_damage_skipped  then pass over damaged checkpoints, as far back as the beginning
    Returns the summary that is also in run.json: status, seconds, checkpoint. Raises DareError for user mistakes and
    faults of the machine; Interrupted, a KeyboardInterrupt, if SIGINT or SIGTERM came, after a save.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, dict):
        recipe = parse_recipe(recipe, where="recipe")
    run_dir = Path("runs") / recipe.name if out is None else Path(out)
    return run_recipe(
        recipe,
        run_dir,
        reporter or NullReporter(),
        is_resumed=is_resumed,
        is_damage_skipped=is_damage_skipped,
    )


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    shift: Shift | None = None,
    mask_token: str = DEFAULT_MASK_TOKEN,
    block_length: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Model:
    """Turn an autoregressive checkpoint into a diffusion model of the family `to`, written to the folder `out`.

    See `dare.families.convert.convert_causal`. The model has to be trained before it says anything sensible.
    """
    family, tokenizer = convert_causal(
        source, to, shift=shift, mask_token=mask_token, block_length=block_length, dtype=find_dtype(dtype)
    )
    model = Model(family, tokenizer)
    model.save(out)
    return model


def average(checkpoints: Sequence[str | Path], out: str | Path, *, last: int | None = None) -> list[Path]:
    """Write the mean of several checkpoints to the folder `out`, atomically; returns the checkpoints, oldest first.

    checkpoints  folders or hub ids; or one run folder, which stands for the `last` checkpoints that it has kept
    Raises DareError as `dare.families.average.average_checkpoints`.
    """
    folders = [Path(path) for path in checkpoints]
    if len(folders) == 1 and (folders[0] / "checkpoints").is_dir():
        folders = list_checkpoints(folders[0] / "checkpoints")
        folders = folders if last is None else folders[-last:]
    elif last is not None:
        raise DareError("--last counts the checkpoints of one run folder", where="last", got=last, fix="remove it")
    folders = [resolve_checkpoint(resolve_model_path(str(folder))) for folder in folders]
    family = average_checkpoints(folders)
    Model(family, load_tokenizer(folders[0])).save(out)
    return folders


def evaluate(
    model: Model | str | Path,
    task: str | dict[str, Any],
    *,
    num: int = 256,
    seed: int = 0,
    split: str = "eval",
    out: str | Path | None = None,
    on_progress: Progress | None = None,
    **decode: Any,
) -> dict[str, Any]:
    """Solve rate of a model on the first `num` problems of a task's split, with its 95 % Wilson interval.

    task    a task's name, or its name and options as in a recipe: {"name": "countdown", "max_value": 9}
    decode  options as in `dare.core.decode.Decode`; the default is greedy
    on_progress  called with (positions settled, all completion positions)
    out     optional folder for summary.json and records.jsonl (written atomically)
    Raises DareError for user mistakes.
    """
    if not isinstance(model, Model):
        model = load(model)
    if model.tokenizer is None:
        raise DareError(
            "evaluation needs a tokenizer", fix="put the model's tokenizer files into the checkpoint folder"
        )
    family, tokenizer = model.family, model.tokenizer
    try:
        choice = TaskChoice.model_validate(task)
        options = Decode.model_validate(decode)
    except ValidationError as error:
        raise explain(error, Decode, where="evaluate", what="the options are") from None

    def generate(prompts: list[list[int]], decode: Decode, key: Key, sample_ids: list[int]) -> TraceBatch:
        return denoise(family, prompts, decode, key, sample_ids, on_progress=on_progress)

    key = Key(seed).fold("evaluation")
    summary, records = evaluate_task(
        generate, tokenizer, choice.build(seed), name=choice.name, decode=options, num=num, key=key, split=split
    )
    if out is not None:
        with whole_directory(Path(out)) as temporary:
            write_json(temporary / "summary.json", summary)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(temporary / "records.jsonl", lines)
    return summary


def evaluate_benchmarks(
    model: Model | str | Path,
    tasks: Sequence[str] = (),
    *,
    out: str | Path,
    preset: str | None = None,
    checkpoint: str | None = None,
    published: str | None = None,
    overrides: dict[str, Any] | None = None,
    shard: Shard | None = None,
    is_weak_sandbox_allowed: bool = False,
    on_progress: Progress | None = None,
    on_result: Callable[[str, dict[str, Any] | None], None] | None = None,
) -> dict[str, dict[str, Any] | None]:
    """Run benchmarks on a model; the result card of each, or None where other shards are missing.

    tasks       rows of `dare.evals.benchmarks.table`; empty: all of the preset
    out         a folder per task: manifest.json, card.md, records.jsonl; an earlier run of the same settings goes on
    preset      table, paper or a YAML file, see `dare.evals.presets`
    checkpoint  where a model object came from: hashed for the result card
    model       a loaded model, a checkpoint, or the URL of a server
    published   preset paper: which published model this is; default: the checkpoint's name
    overrides   settings by dotted name, applied last: {"gen_length": 64, "task.num_shots": 4}
    Raises DareError for user mistakes, before the first forward where possible: all data is looked for first.
    """
    backend = evaluation_backend(model, checkpoint)
    family = family_of(backend, preset)
    checkpoint = checkpoint or ("" if isinstance(model, Model) else str(model))
    planned = plan(preset, tasks, family=family, checkpoint=checkpoint, model=published, overrides=overrides)
    benchmarks = [find_benchmark(item.task) for item in planned]
    for benchmark, item in zip(benchmarks, planned, strict=True):
        benchmark.data_path()
        benchmark.shots(item.settings.num_shots)
        if isinstance(benchmark, ProgramBenchmark):
            benchmark.sandbox = Sandbox(is_weak_allowed=is_weak_sandbox_allowed)
    results: dict[str, dict[str, Any] | None] = {}
    for benchmark, item in zip(benchmarks, planned, strict=True):
        results[item.task] = run_benchmark(
            backend, benchmark, item.settings, Path(out), shard=shard, facts=item.facts, on_progress=on_progress
        )
        if on_result is not None:
            on_result(item.task, results[item.task])
    return results


def evaluation_backend(model: Model | str | Path, checkpoint: str | None = None) -> Backend:
    """What evaluations ask of a model: a loaded one, a checkpoint, or the URL of a server.

    checkpoint  where a model object came from, to be hashed for the result card
    Raises DareError if the model has no tokenizer, and as `dare.load` or `HttpBackend` do.
    """
    if not isinstance(model, Model):
        checkpoint = str(model)
        if is_url(checkpoint):
            return HttpBackend(checkpoint)
        model = load(model)
    if model.tokenizer is None:
        raise DareError("evaluation needs a tokenizer", fix="put the model's tokenizer files into the folder")
    folder = None if checkpoint is None else Path(resolve_checkpoint(resolve_model_path(checkpoint)))
    return NativeBackend(model.family, model.tokenizer, folder)


def family_of(backend: Backend, preset: str | None) -> str:
    """The family that a preset is looked up for; "" where there is no preset and the back end does not know.

    Raises DareError for a preset with a back end that does not know.
    """
    family = backend.describe()["family"]
    if family is None and preset is not None:
        raise DareError(
            "a server does not say which family it serves, so no preset fits",
            where="--preset",
            got=preset,
            fix="give --tasks and the decode options",
        )
    return family or ""
