"""A plan for a cluster: from a recipe and words of the command line to a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.recipe_errors import explain
from dare.core.yaml_text import load_yaml

if TYPE_CHECKING:
    from dare.training.cluster import ClusterPlan, Hardware, Sharding
    from dare.training.workload import Work

_PROMPT_LENGTH = 256
_GB = 1e9


@dataclass(frozen=True)
class Planned:
    """A plan with everything that it follows from."""

    work: Work
    sharding: Sharding
    hardware: Hardware
    plan: ClusterPlan
    row_length: int


def plan_nodes(
    recipe: Recipe, num_nodes: int, gpus_per_node: int, *, row_length: int | None = None, assume: Sequence[str] = ()
) -> Planned:
    """The plan of a recipe on so many GPUs. Raises DareError for assumptions or shardings that make no sense."""
    from dare.executors.choices import Verl
    from dare.families.build import outline_sizes
    from dare.training.cluster import Sharding, plan_cluster
    from dare.training.run import with_checkpoint
    from dare.training.workload import workload

    recipe = with_checkpoint(recipe)
    hardware = _hardware(assume)
    family = outline_sizes(recipe.model, recipe.lora)
    algorithm = recipe.algorithm.build().adapted(family.spec)
    length = row_length or _PROMPT_LENGTH + recipe.decode.gen_length
    executor = recipe.executor.build()
    options = executor.options if isinstance(executor, Verl) else Verl.Config()
    size = options.fsdp_size
    sharding = Sharding(num_nodes, gpus_per_node, size, options.reshard_after_forward, options.cpu_offload)
    if size is not None and sharding.num_gpus % size:
        raise DareError(
            "copies of the weights are of equal size",
            where="executor.fsdp_size",
            got=f"{size}, on {sharding.num_gpus} GPUs",
            fix="choose a divisor of the number of GPUs",
        )
    work = workload(recipe, family, algorithm, length, hardware.tokens_per_step)
    return Planned(work, sharding, hardware, plan_cluster(work, sharding, hardware), length)


def cluster_text(planned: Planned) -> str:
    """Tables of memory, time and communication, the assumptions, and where it breaks."""
    plan, work, sharding = planned.plan, planned.work, planned.sharding
    copies = "copy" if sharding.num_copies == 1 else "copies"
    lines = [
        f"{sharding.num_nodes} x {sharding.gpus_per_node} GPUs, {sharding.num_copies} {copies} of the weights over "
        f"{sharding.shard_size} GPUs each",
        f"{work.model.num_trained:,} of {work.model.num_parameters:,} parameters are trained; {work.num_rows} rows of "
        f"{planned.row_length} tokens, {work.num_views} views, {work.num_updates} updates a step",
        "",
        *_table("memory of a GPU", {**plan.memory, "peak, at one time": plan.peak}, _GB, "GB"),
        *_table("host memory of a node", plan.host_memory, _GB, "GB"),
        *_table("time of a step", {**plan.seconds, "whole step": plan.step_seconds}, 1.0, "s"),
        *_table("sent by a GPU in a step", plan.volume, _GB, "GB"),
        f"{plan.tokens_per_second:,.0f} trained tokens/s; {plan.step_seconds * sharding.num_gpus / 3.6:,.1f} GPU hours "
        "for 1,000 steps",
        "assumed: " + ", ".join(f"{name} {value:g}" for name, value in planned.hardware.model_dump().items()),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def cluster_json(planned: Planned) -> str:
    """The same as one JSON object; bytes and seconds."""
    data = {
        "sharding": asdict(planned.sharding),
        "hardware": planned.hardware.model_dump(),
        "work": asdict(planned.work),
        "row_length": planned.row_length,
        **asdict(planned.plan),
    }
    return json.dumps(data, indent=2)


def _table(title: str, rows: dict[str, float], unit: float, name: str) -> list[str]:
    if not rows:
        return []
    return [title, *(f"  {label:<28}{value / unit:>10,.2f} {name}" for label, value in rows.items()), ""]


def _hardware(assume: Sequence[str]) -> Hardware:
    from dare.training.cluster import Hardware

    values = {}
    for item in assume:
        key, separator, text = item.partition("=")
        if not separator:
            raise DareError(f"cannot read the assumption '{item}'", expected="key=value, for example mfu=0.35")
        try:
            values[key] = load_yaml(text)
        except yaml.YAMLError as error:
            raise DareError(f"cannot read the value of '{item}'", got=str(error)) from None
    try:
        return Hardware.model_validate(values)
    except ValidationError as error:
        raise explain(error, Hardware, where="--assume", what="the assumptions are") from None
