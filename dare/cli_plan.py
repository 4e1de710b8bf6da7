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
    nodes: Annotated[
        int | None, typer.Option(min=1, help="plan for so many nodes of GPUs instead of this machine")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="with --nodes")] = 8,
    row_length: Annotated[
        int | None, typer.Option(min=2, help="with --nodes: tokens of a row; default: prompts of 256")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="with --nodes: KEY=VALUE of the cost model, such as mfu=0.35; repeatable")
    ] = None,
) -> None:
    """Plan: the memory that a recipe needs, by part, and its speed, before anything is loaded or written.

    A few layers of the recipe's network are run on its own rows for some seconds; the rest is sizes of tensors. With
    --nodes nothing is run: memory, time and communication of a GPU follow from a cost model (docs/scaling.md).

    \b
    Example:
      dare plan recipes/tiny/llada_sft.yaml model.create.num_layers=8
      dare plan recipes/cluster/llada_8b_rl.yaml model.path=recipes/cluster/models/llada-8b --nodes 2
    """
    from dare.core.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if nodes is not None:
        from dare.terminal.cluster import cluster_json, cluster_text, plan_nodes

        large = plan_nodes(resolved, nodes, gpus_per_node, row_length=row_length, assume=assume or [])
        typer.echo(cluster_json(large) if is_json else cluster_text(large))
        return
    from dare.terminal.planning import plan_json, plan_text
    from dare.training.planning import plan_run

    found = plan_run(resolved)
    typer.echo(plan_json(found) if is_json else plan_text(found))
