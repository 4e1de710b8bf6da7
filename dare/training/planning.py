"""`dare plan`: a recipe's memory and speed, from its own rows and a calibration of a few seconds."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any

import torch

from dare.algorithms.base import Algorithm
from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.types import Canvas, Samples, Views
from dare.data.order import batch_at
from dare.data.read import Tally
from dare.diffusion import corrupt
from dare.families.base import Family
from dare.families.build import DTYPES, outline, pick_device
from dare.families.tokenizer import encode_prompt
from dare.rollout import plan as rollout
from dare.tasks.base import Task
from dare.training.calibrate import calibrate
from dare.training.feed import STREAMS, text_sources
from dare.training.micro_batches import forwards
from dare.training.offline import rows_to_samples
from dare.training.plan import MemoryPlan, cache_bytes, make_plan
from dare.training.rollout_cost import forward_shape, rollout_tokens
from dare.training.run import model_tokenizer, with_checkpoint

_STEPS_READ = 50  # steps whose rows are looked at for the largest micro-batch
_PROMPTS_READ = 256


@dataclass(frozen=True)
class RunPlan:
    """Memory by part (bytes), seconds per optimizer step, and scored tokens per second of training.

    rollout_seconds  online: of the forwards of a step's rollout, whose completions all have full length; else None
    longest_row, num_micro_batches  of the step that needs most
    """

    memory: MemoryPlan
    device: str
    num_parameters: int
    num_trained: int
    longest_row: int
    num_micro_batches: int
    seconds_per_step: float
    tokens_per_second: float
    rollout_seconds: float | None = None


@dataclass(frozen=True)
class _Step:
    """The step that needs most: its views, their canvases, and the parts in which they run."""

    views: Views
    canvas: Canvas
    parts: list[torch.Tensor]
    num_scored: int


def plan_run(recipe: Recipe) -> RunPlan:
    """What the recipe will need. Nothing is written, and no weights are loaded.

    Offline: the first 50 steps are laid out as they will be, and the largest is measured. Online: the longest of the
    first 256 prompts with a full completion, in micro-batches that are full; the seconds of a step are those of an
    update, those of its rollout stand beside them. A quantised base is planned as if it were not. Raises DareError as
    `dare train` does for recipes that cannot run.
    """
    recipe = with_checkpoint(recipe)
    check(recipe)
    algorithm: Algorithm[Any] = recipe.algorithm.build()
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    has_pairs = algorithm.row_kind != "completions"
    tally = Tally()
    sources = text_sources(recipe, task, tally, has_pairs=has_pairs) if algorithm.kind == "offline" else []
    tokenizer = model_tokenizer(recipe, task, sources)
    family = outline(recipe.model, tokenizer, recipe.lora).to(DTYPES[recipe.model.dtype], torch.device("meta"))
    engine = _Outline(family)
    algorithm = algorithm.adapted(family.spec)
    if sources:
        examples = STREAMS[algorithm.row_kind](sources, recipe, tokenizer, family.spec, tally)
        batches = [batch_at(examples, recipe.train.batch_size, step) for step in range(_num_read(recipe))]
        samples = [rows_to_samples(engine, batch, recipe.decode.block_length) for batch in batches]  # type: ignore[arg-type]
    elif task is not None:
        samples = [_rollout_samples(engine, recipe, task, tokenizer)]
    else:
        raise DareError("there is nothing to train on", where=recipe.name)
    step = max((_step(recipe, algorithm, item, index) for index, item in enumerate(samples)), key=_size)
    return _result(recipe, algorithm, family, step)


class _Outline:
    """What `rows_to_samples` needs of an engine."""

    def __init__(self, family: Family) -> None:
        self.spec = family.spec
        self.canvas = family.canvas


def _num_read(recipe: Recipe) -> int:
    return min(recipe.train.steps, _STEPS_READ)


def _rollout_samples(engine: _Outline, recipe: Recipe, task: Task[Any], tokenizer: Any) -> Samples:
    prompts = [task.prompt("train", index) for index in range(min(_PROMPTS_READ, task.size("train")))]
    longest = max((encode_prompt(tokenizer, prompt) for prompt in prompts), key=len)
    num = recipe.train.prompts_per_step * recipe.train.completions_per_prompt
    block_length = recipe.decode.block_length or engine.spec.block_length
    filler = -(len(longest) + recipe.decode.gen_length) % block_length if engine.spec.block_grid == "sequence" else 0
    completion = [engine.spec.pad_id] * (recipe.decode.gen_length + filler)
    canvas = engine.canvas([longest] * num, [completion] * num, recipe.decode.block_length)
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.arange(num),
        advantage_B=torch.ones(num),
        group_B=torch.arange(num),
        mask_id=engine.spec.mask_id,
        eos_ids=engine.spec.eos_ids,
    )


def _step(recipe: Recipe, algorithm: Algorithm[Any], samples: Samples, index: int) -> _Step:
    key = Key(recipe.seed).fold("views", index + 1).fold(0)
    if algorithm.kind == "offline":
        views = algorithm.corrupt(samples, key)
    else:
        views = corrupt.bernoulli(
            samples, key, num_views=max(1, recipe.train.micro_batch_views // len(samples.group_B))
        )
    length_R = samples.canvas.is_real_BS.sum(-1)[views.sample_R]
    return _Step(views, samples.canvas, forwards(length_R, recipe.train), int(samples.is_scored_BS.sum()))


def _size(step: _Step) -> int:
    return max(_positions(step, part) for part in step.parts)


def _positions(step: _Step, part: torch.Tensor) -> int:
    length_R = step.canvas.is_real_BS.sum(-1)[step.views.sample_R[part]]
    return len(part) * int(length_R.max())


def _result(recipe: Recipe, algorithm: Algorithm[Any], family: Family, step: _Step) -> RunPlan:
    device = pick_device(recipe.model.device)
    largest = max(step.parts, key=lambda part: _positions(step, part))
    chosen = step.views.rows(largest)
    canvas = step.canvas.rows(chosen.sample_R)
    process = _resident_bytes()
    all_real = int(step.canvas.is_real_BS.sum(-1)[step.views.sample_R].sum())
    is_online = algorithm.kind == "online"
    rollout_plan = rollout.make_plan(family, recipe.decode) if is_online else None
    shape = None if rollout_plan is None else forward_shape(rollout_plan, step.canvas)
    cost = calibrate(family, device, recipe, chosen, canvas, all_real, shape)
    # What the calibration took beyond its tensors: libraries that a first step loads, kernels, the allocator's gaps.
    process = 0 if device.type == "cuda" else max(process, _resident_bytes() - cost.calibrated)
    cache = 0
    if rollout_plan is not None and rollout_plan.cache != "none":
        num_rows = min(recipe.decode.batch_size, step.canvas.batch_size)
        cache = cache_bytes(family, num_rows, step.canvas.length)
    rollout_seconds = None
    if rollout_plan is not None and shape is not None:
        num_tokens = rollout_tokens(rollout_plan, step.canvas, recipe.train.completions_per_prompt)
        rollout_seconds = cost.forward_seconds * num_tokens / (shape[0] * shape[1])
    memory = make_plan(
        family,
        cost,
        num_micro_batches=len(step.parts),
        rollout=cache,
        has_reference=algorithm.needs_reference and recipe.reference.mode == "live" and family.adapter is None,
        has_critic=algorithm.critic_lr is not None,
        process=process,
    )
    parameters = list(family.network.parameters())
    return RunPlan(
        memory=memory,
        device=str(device),
        num_parameters=family.num_parameters,
        num_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        longest_row=int(step.canvas.is_real_BS.sum(-1).max()),
        num_micro_batches=len(step.parts),
        seconds_per_step=cost.seconds,
        tokens_per_second=step.num_scored / cost.seconds,
        rollout_seconds=rollout_seconds,
    )


def _resident_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
