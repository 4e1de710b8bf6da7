"""The verb `dare plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from dare.cli_options import Overrides, RecipeFile


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    is_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON, bytes and seconds")] = False,
) -> None:
    """Plan: the memory that a recipe needs, by part, and its speed, before anything is loaded or written.

    A few layers of the recipe's network are run on its own rows for some seconds; the rest is sizes of tensors.

    \b
    Example:
      dare plan recipes/tiny/llada_sft.yaml model.create.num_layers=8
    """
    from dare.core.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    from dare.terminal.planning import plan_json, plan_text
    from dare.training.planning import plan_run

    found = plan_run(resolved)
    typer.echo(plan_json(found) if is_json else plan_text(found))
