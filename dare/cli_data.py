"""The verbs `dare data inspect` and `dare data check`; like those of `dare.cli`, their bodies import what they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare.cli_options import Overrides
from dare.core.errors import DareError

if TYPE_CHECKING:
    from dare.core.recipe import Recipe

DataOrRecipe = Annotated[
    str, typer.Argument(metavar="FILE_OR_RECIPE", help="a data file, folder or hub id, or a recipe", show_default=False)
]
Model = Annotated[str | None, typer.Option(help="checkpoint whose tokenizer and template to use")]

data_app = typer.Typer(
    help="Look at training data and check it; benchmark data.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.command("inspect", short_help="Show rows: loss mask, noise, lengths, padding.")
def inspect(
    data: DataOrRecipe,
    overrides: Overrides = None,
    *,
    model: Model = None,
    num: Annotated[int, typer.Option(min=1, help="rows to show")] = 2,
    max_rows: Annotated[int, typer.Option(min=1, help="rows to read for the statistics")] = 10_000,
    plot: Annotated[Path | None, typer.Option(help="also draw the lengths, .png or .svg")] = None,
) -> None:
    """Show rows as the model sees them: what carries loss, where EOS is, noise at several t, how long they are.

    Data is read as the recipe's data section says; for a data file, give its keys as data.KEY=VALUE.

    \b
    Examples:
      dare data inspect recipes/tiny/llada_sft.yaml --num 3
      dare data inspect train.jsonl --model runs/sft data.eos=one --plot lengths.png
    """
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise DareError("the plot is a .png or .svg file", where="--plot", got=plot)
    recipe = _recipe(data, model, overrides or [])
    from dare.terminal.data import print_inspection
    from dare.training.inspection import inspect_data

    found = inspect_data(recipe, max_rows)
    print_inspection(found, recipe, num)
    if plot is not None:
        from dare.report.lengths import save_lengths

        save_lengths(found.lengths(), Path(data).name, plot)
        typer.echo(f"plot: {plot}")


@data_app.command("check", short_help="Check every row and list all errors.")
def check(
    data: DataOrRecipe,
    overrides: Overrides = None,
    *,
    model: Model = None,
    max_errors: Annotated[int, typer.Option(min=1, help="errors to list")] = 20,
) -> None:
    """Check every row of a data file or recipe; list what is wrong with file and line.

    With --model, or for a recipe, rows are encoded too: lengths, roles that the chat template does not know, characters
    and ids outside the vocabulary. Exit code 2 if anything is wrong.

    \b
    Examples:
      dare data check train.jsonl
      dare data check train.jsonl --model runs/sft data.max_length=512
    """
    from dare.core.data_recipe import DataRecipe
    from dare.training.inspection import check_data

    encoder: Any = None
    if model is None and not _is_recipe(data):
        rows = _data_recipe(data, overrides or [])
    else:
        recipe = _recipe(data, model, overrides or [])
        rows = recipe.data or DataRecipe()
        encoder = _encoder(recipe)
    if not rows.all_sources:
        raise DareError("there are no rows to check", where=f"{data}: data", fix="give data.path, or a data file")
    tally = check_data(rows, max_errors, encoder)
    for error in tally.errors:
        typer.echo(f"{error}\n")
    if tally.num_bad > len(tally.errors):
        typer.echo(f"... and {tally.num_bad - len(tally.errors)} more; --max-errors lists them\n")
    counts = f"{tally.num_dropped} to drop, {tally.num_truncated} to cut, " if encoder is not None else ""
    typer.echo(f"{tally.num_read} rows: {counts}{tally.num_bad} wrong")
    if tally.num_bad:
        raise typer.Exit(2)


def _is_recipe(data: str) -> bool:
    return Path(data).suffix in (".yaml", ".yml")


def _recipe(data: str, model: str | None, overrides: list[str]) -> Recipe:
    """The recipe, or one that trains on the data file; --model replaces where its policy comes from."""
    from dare.core.recipe import load_recipe, parse_recipe, with_overrides

    if _is_recipe(data):
        recipe = load_recipe(data, overrides)
        if model is None:
            return recipe
        content = recipe.model_dump(mode="json") | {"model": {"path": model}}
        return parse_recipe(content, where=data)
    if model is None:
        raise DareError("a data file needs a tokenizer", where=data, fix="give --model CHECKPOINT, or a recipe")
    content = {"name": Path(data).name, "model": {"path": model}, "algorithm": {"name": "sft"}, "data": {"path": data}}
    return parse_recipe(with_overrides(content, overrides), where=data)


def _data_recipe(data: str, overrides: list[str]) -> Any:
    from pydantic import ValidationError

    from dare.core.data_recipe import DataRecipe
    from dare.core.recipe import with_overrides
    from dare.core.recipe_errors import explain

    content = with_overrides({"data": {"path": data}}, overrides)
    try:
        return DataRecipe.model_validate(content["data"])
    except ValidationError as error:
        raise explain(error, DataRecipe, where=data, what="the data options are") from None


def _encoder(recipe: Recipe) -> Any:
    """The encoder of a recipe's rows, for a checkpoint; a new model takes every character."""
    from dare.core.data_recipe import DataRecipe
    from dare.families.build import family_spec
    from dare.training.data import RowEncoder
    from dare.training.run import model_tokenizer, with_checkpoint

    if recipe.model.path is None:
        return None
    recipe = with_checkpoint(recipe)
    tokenizer = model_tokenizer(recipe, None, [])
    spec = family_spec(recipe.model, tokenizer)
    return RowEncoder(tokenizer, recipe.data or DataRecipe(), recipe.decode, spec)
