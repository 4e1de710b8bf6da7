"""`dare.train` and `dare.evaluate`: what the command line does, from Python."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dare.core.decode import Decode
from dare.core.engine import Progress
from dare.core.errors import DareError
from dare.core.files import whole_directory, write_json, write_text
from dare.core.recipe import Recipe, TaskChoice, load_recipe, parse_recipe
from dare.core.recipe_errors import explain
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.evals.runner import evaluate_task
from dare.model import Model, load
from dare.rollout.engine import denoise
from dare.terminal.progress import NullReporter
from dare.training.run import train as run_recipe
from dare.training.session import Reporter


def train(
    recipe: Recipe | dict[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    is_resumed: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Run a recipe (object, plain data or YAML file) into the folder `out`, by default runs/NAME.

    Returns the summary that is also in run.json: status, seconds, checkpoint. Raises DareError for user mistakes.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, dict):
        recipe = parse_recipe(recipe, where="recipe")
    run_dir = Path("runs") / recipe.name if out is None else Path(out)
    return run_recipe(recipe, run_dir, reporter or NullReporter(), is_resumed=is_resumed)


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
