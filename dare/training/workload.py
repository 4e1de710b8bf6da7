"""What one step of a recipe asks for, counted on a few rows that are laid out as the run's are; no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dare.algorithms.base import Algorithm
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.types import Canvas, Samples, Views
from dare.diffusion import corrupt
from dare.families.base import Family
from dare.families.build import DTYPES
from dare.families.flops import active_parameters, training_flops
from dare.families.layers.moe import Experts, Router
from dare.rollout.plan import make_plan

_NUM_ROWS = 4  # rows that are laid out; two groups
_TOKEN = 0


@dataclass(frozen=True)
class ModelSizes:
    """Numbers in a network. `outside_layers`: embedding, last norm and head; `expert_parameters`: of all layers."""

    num_parameters: int
    num_trained: int
    outside_layers: int
    largest_layer: int
    largest_trained_layer: int
    num_layers: int
    hidden_size: int
    query_size: int
    kv_size: int
    has_head_norms: bool
    active_per_token: float
    num_experts: int
    experts_per_token: int
    expert_parameters: int

    def read_bytes(self, num_tokens: int, dtype_bytes: int) -> float:
        """Bytes of the weights that a forward of so many tokens reads: of the experts, those that get a token."""
        missed = (1.0 - self.experts_per_token / self.num_experts) ** num_tokens if self.num_experts else 0.0
        return (self.num_parameters - missed * self.expert_parameters) * dtype_bytes

    @property
    def kept_per_token(self) -> float:
        """Numbers that a layer keeps of a token for its backward; fitted to what tiny networks keep."""
        hidden, query, kv = self.hidden_size, self.query_size, self.kv_size
        attention = 5.0 * hidden + (6.0 if self.has_head_norms else 2.0) * query + 4.0 * kv
        copies = 2.0 * self.experts_per_token * hidden  # a token is copied for each of its experts, and so are outputs
        inner = (self.active_per_token / self.num_layers - 2.0 * hidden * (query + kv)) / (3.0 * hidden)
        return attention + copies + 4.0 * inner


@dataclass(frozen=True)
class Work:
    """One step, all GPUs together unless it says otherwise.

    forward_flops        of one forward of all views
    num_views, num_scored  views of an inner iteration; tokens that are trained on
    num_updates          optimizer steps
    num_scorings         forwards over all views without a backward: old, reference, critic, predictions
    num_forwards         denoising forwards of a row, 0 offline
    rollout_flops        of one denoising forward of one row
    rollout_positions    positions that such a forward computes
    rollout_rows         rows that are denoised together, at most
    views_per_micro_batch, activation_bytes  of one GPU
    cache_per_row        bytes of keys and values
    """

    model: ModelSizes
    dtype_bytes: int
    recompute: str
    num_rows: int
    num_views: int
    num_scored: int
    forward_flops: float
    num_updates: int
    num_scorings: int
    num_references: int
    num_critics: int
    num_forwards: int
    rollout_flops: float
    rollout_positions: int
    rollout_rows: int
    views_per_micro_batch: int
    activation_bytes: float
    cache_per_row: float

    def cache_bytes(self, num_rows: int) -> float:
        """Cached keys and values of so many rows, or of as many as are denoised together."""
        return self.cache_per_row * min(num_rows, self.rollout_rows)


def workload(
    recipe: Recipe, family: Family, algorithm: Algorithm[Any], row_length: int, tokens_per_step: float
) -> Work:
    """The work of a step whose rows all have `row_length` tokens, `decode.gen_length` of them completion.

    family           without weights
    tokens_per_step  that a policy which decides itself commits in a step
    Raises DareError for decode options that do not fit the family.
    """
    train, is_online = recipe.train, algorithm.kind == "online"
    samples = _samples(recipe, family, row_length)
    views = _views(algorithm, samples)
    num_rows = train.prompts_per_step * train.completions_per_prompt if is_online else train.batch_size
    scale = num_rows / _NUM_ROWS
    model, dtype = model_sizes(family), DTYPES[recipe.model.dtype]
    canvas = samples.canvas.rows(views.sample_R)
    per_view = math.ceil(_positions(family, views, samples.canvas) / views.num_views)
    num_together = max(1, min(train.micro_batch_views, train.micro_batch_tokens // samples.canvas.length))
    needs_reference = algorithm.needs_reference and recipe.reference.mode == "live"
    num_updates = train.updates_per_rollout if is_online else 1
    num_scorings = (0 if algorithm.is_linear else num_updates) + needs_reference * num_updates
    num_scorings += num_updates * algorithm.num_predictions + (algorithm.critic_lr is not None) * 2 * num_updates
    num_scorings += (num_updates - 1) * algorithm.needs_old
    with_grad = training_flops(family, views, canvas)
    total, trained = active_parameters(family)
    forwards, flops, positions = (
        _denoising(recipe, family, samples.canvas, tokens_per_step) if is_online else (0, 0.0, 0)
    )
    is_cached = is_online and (samples.canvas.is_blockwise or recipe.decode.cache in ("prefix", "dual"))
    return Work(
        model=model,
        dtype_bytes=dtype.itemsize,
        recompute=train.recompute,
        num_rows=num_rows,
        num_views=math.ceil(views.num_views * scale),
        num_scored=math.ceil(int(samples.is_scored_BS.sum()) * scale),
        forward_flops=with_grad * scale / (2.0 + (trained / total if total else 1.0)),
        num_updates=num_updates,
        num_scorings=num_scorings,
        num_references=int(needs_reference and family.adapter is None),
        num_critics=int(algorithm.critic_lr is not None),
        num_forwards=forwards,
        rollout_flops=flops,
        rollout_positions=positions,
        rollout_rows=recipe.decode.batch_size,
        views_per_micro_batch=num_together,
        activation_bytes=_kept(recipe, model, per_view * num_together) * dtype.itemsize,
        cache_per_row=2.0 * model.num_layers * model.kv_size * samples.canvas.length * dtype.itemsize * is_cached,
    )


def model_sizes(family: Family) -> ModelSizes:
    """Counted on the network, which may be on the meta device."""
    network = family.network
    layers = [sum(p.numel() for p in layer.parameters()) for layer in network.layers]
    trained = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in network.layers]
    experts = [module for module in network.modules() if isinstance(module, Experts)]
    routers = [module for module in network.modules() if isinstance(module, Router)]
    parameters = list(network.parameters())
    num_parameters = sum(p.numel() for p in parameters)
    return ModelSizes(
        num_parameters=num_parameters,
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        outside_layers=num_parameters - sum(layers),
        largest_layer=max(layers),
        largest_trained_layer=max(trained),
        num_layers=network.num_layers,
        hidden_size=network.head_weight.shape[1],
        query_size=network.num_heads * network.head_dim,
        kv_size=network.num_kv_heads * network.head_dim,
        has_head_norms=any(p.ndim == 1 and len(p) == network.head_dim for p in network.layers[0].parameters()),
        active_per_token=active_parameters(family)[0],
        num_experts=len(next(iter(experts[0].parameters()))) if experts else 0,
        experts_per_token=routers[0].experts_per_token if routers else 0,
        expert_parameters=sum(p.numel() for module in experts for p in module.parameters()),
    )


def _samples(recipe: Recipe, family: Family, row_length: int) -> Samples:
    """A few rows of the length; their completions were committed from left to right, one token a step."""
    decode, spec = recipe.decode, family.spec
    completion = [_TOKEN] * min(decode.gen_length, row_length - 1)
    prompt = [_TOKEN] * (row_length - len(completion))
    canvas = family.canvas([prompt] * _NUM_ROWS, [completion] * _NUM_ROWS, decode.block_length)
    order_BS = canvas.is_completion_BS.long().cumsum(-1) - 1
    return Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.arange(_NUM_ROWS),
        advantage_B=torch.tensor([1.0, -1.0] * (_NUM_ROWS // 2)),
        group_B=torch.arange(_NUM_ROWS) // 2,
        mask_id=spec.mask_id,
        step_map_BS=torch.where(canvas.is_completion_BS, order_BS, -1),
        rollout_logp_BS=torch.zeros(canvas.input_BS.shape),
        eos_ids=spec.eos_ids,
        reward_B=torch.tensor([1.0, 0.0] * (_NUM_ROWS // 2)),
    )


def _views(algorithm: Algorithm[Any], samples: Samples) -> Views:
    """The algorithm's own; of one that reads drafts or trees a view per step, which is what it can choose from."""
    if algorithm.needs:
        return corrupt.trace_replay(samples, samples.is_scored_BS)
    return algorithm.corrupt(samples, Key(0))


def _positions(family: Family, views: Views, canvas: Canvas) -> float:
    """Positions that a forward of the views computes: block models read a clean stream per sample besides."""
    length_R = canvas.is_real_BS.sum(-1)[views.sample_R]
    clean = float(canvas.is_real_BS.sum()) if canvas.is_blockwise else 0.0
    return float(length_R.sum()) + clean


def _kept(recipe: Recipe, model: ModelSizes, num_tokens: int) -> float:
    """Numbers that the layers keep of so many positions, and what one layer has while it is computed again."""
    whole = model.kept_per_token * num_tokens
    if recipe.train.recompute == "full":
        return model.num_layers * model.hidden_size * num_tokens + whole
    if recipe.train.recompute == "selective":
        return 0.55 * model.num_layers * whole + 0.45 * whole
    return model.num_layers * whole


def _denoising(recipe: Recipe, family: Family, canvas: Canvas, tokens_per_step: float) -> tuple[int, float, int]:
    """Denoising forwards of a row, floating-point operations of one, and the positions that it computes."""
    plan, decode, network = make_plan(family, recipe.decode), recipe.decode, family.network
    num_blocks = math.ceil(decode.gen_length / plan.block_length)
    per_block = math.ceil(plan.block_length / tokens_per_step) if decode.is_dynamic else plan.num_steps
    positions = canvas.length if plan.cache == "none" else plan.block_length
    total, _ = active_parameters(family)
    attention = 4.0 * positions * canvas.length * network.num_heads * network.head_dim * network.num_layers
    flops = positions * 2.0 * (total + network.head_weight.numel()) + attention
    return num_blocks * per_block, flops, positions
