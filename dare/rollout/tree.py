"""Branching rollouts: several completions grow from each partly denoised canvas.

    root (all masked) --+-- child --+-- leaf      branching (2, 2): levels end after equal shares of the fixed
                        |           +-- leaf      schedule's steps; a leaf is a finished completion
                        +-- child --+-- leaf
                                    +-- leaf

A node is denoised once and then copied. Each continues under the sample id of the first leaf below it: siblings draw
different numbers, and no (id, position, step) is drawn twice. So a leaf is what a plain rollout with the ids of its
ancestors would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import TraceBatch, Tree
from dare.families.base import Family
from dare.rollout.batch import Batch
from dare.rollout.engine import Run
from dare.rollout.live import Live
from dare.rollout.plan import Plan, check_prompts, make_plan
from dare.rollout.record import begin_batch, empty_trace, finished, record_rows


def grow_trees(
    family: Family,
    prompts: list[list[int]],
    decode: Decode,
    key: Key,
    sample_ids: list[int],
    branching: tuple[int, ...],
    *,
    weights_version: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> TraceBatch:
    """One completion per prompt, in order, on the CPU, with the tree that they are the leaves of.

    branching    children of a node at each level; adjacent prompts, as many as a tree has leaves, must be equal
    on_progress  called with (leaves finished, all leaves) after every batch of trees

    Raises DareError as `denoise` does, and for a policy without a fixed schedule or an approximate cache.
    """
    num_leaves = math.prod(branching)
    if len(prompts) != len(sample_ids) or len(prompts) % num_leaves:
        raise ValueError(f"{len(prompts)} prompts and {len(sample_ids)} sample ids for trees of {num_leaves} leaves")
    if any(prompts[row] != prompts[row - row % num_leaves] for row in range(len(prompts))):
        raise ValueError("the leaves of a tree have one prompt")
    plan = make_plan(family, decode)
    _check(plan)
    check_prompts(family, prompts)
    canvas = family.empty_canvas(prompts, decode.gen_length, plan.block_length)
    trace = empty_trace(family, plan, canvas, sample_ids, weights_version)
    levels: list[list[Tensor]] = [[] for _ in range(len(branching) + 1)]
    roots_T = torch.arange(0, len(prompts), num_leaves)
    with plan.running(family):
        for root_T in torch.split(roots_T, max(1, decode.batch_size // num_leaves)):
            batch = begin_batch(family, plan, trace, root_T)
            leaf_row_H = root_T
            for level, num_children in enumerate((*branching, 0)):
                width = canvas.length - batch.canvas.length
                levels[level].append(functional.pad(batch.canvas.input_BS.cpu(), (0, width)))
                if num_children:
                    batch, leaf_row_H = _grow(family, batch, plan, key, trace, leaf_row_H, branching, level)
            record_rows(batch, trace, torch.arange(len(leaf_row_H)), leaf_row_H, family.spec.pad_id)
            if on_progress is not None:
                on_progress(int(leaf_row_H.max()) + 1, len(prompts))
    done = finished(trace)
    return replace(done, tree=_tree(levels, branching, done))


def _grow(
    family: Family,
    batch: Batch,
    plan: Plan,
    key: Key,
    trace: TraceBatch,
    leaf_row_H: Tensor,
    branching: tuple[int, ...],
    level: int,
) -> tuple[Batch, Tensor]:
    """The next level: the children of every row, denoised to their own branch point, and their first leaves."""
    num_children, stride = branching[level], math.prod(branching[level + 1 :])
    num_nodes, device = len(leaf_row_H), batch.start_B.device
    index_H = torch.arange(num_nodes).repeat_interleave(num_children)
    leaf_row_H = leaf_row_H[index_H] + torch.arange(num_children).repeat(num_nodes) * stride
    twins = index_H.tolist()
    index_H = index_H.to(device)
    is_last = level + 1 == len(branching)
    total_B = _num_blocks(batch) * plan.num_steps
    stop_B = total_B * (level + 1) // len(branching)
    stop_H = torch.full_like(index_H, torch.iinfo(torch.int64).max) if is_last else stop_B[index_H]
    children = batch.branch(index_H, trace.sample_id_B[leaf_row_H].to(device), stop_H)
    live = Live(children, range(len(twins)), twins, len(twins))
    for _ in Run(family, plan, key, children, live).steps():
        pass
    return children, leaf_row_H


def _num_blocks(batch: Batch) -> Tensor:
    """int64 [B]: blocks that hold completion positions."""
    first_B1 = batch.canvas.is_completion_BS.int().argmax(-1, keepdim=True)
    block_BS = batch.canvas.block_BS
    return (block_BS.gather(1, batch.end_B[:, None] - 1) - block_BS.gather(1, first_B1))[:, 0] + 1


def _tree(levels: list[list[Tensor]], branching: tuple[int, ...], trace: TraceBatch) -> Tree:
    """Nodes level by level; leaves hold the finished completions."""
    num_rows = trace.canvas.batch_size
    states = [torch.cat(level)[:, : trace.canvas.length] for level in levels]
    states[-1] = trace.canvas.input_BS
    parents, samples, start = [torch.full((len(states[0]),), -1)], [], 0
    for level, state_NS in enumerate(states):
        samples.append(torch.arange(0, num_rows, num_rows // len(state_NS)))
        if level:
            parents.append(start + torch.arange(len(state_NS)) // branching[level - 1])
            start += len(states[level - 1])
    is_leaf = [torch.full((len(state_NS),), level == len(branching)) for level, state_NS in enumerate(states)]
    return Tree(torch.cat(states), torch.cat(parents), torch.cat(samples), torch.cat(is_leaf))


def _check(plan: Plan) -> None:
    if plan.decode.is_dynamic:
        raise DareError(
            "trees branch after equal shares of a fixed schedule",
            where="decode.unmask",
            got=plan.decode.unmask,
            fix="use max_prob, entropy, margin or low_confidence",
        )
    if plan.has_stop_inside:
        raise DareError(
            "the nodes of a tree branch between blocks",
            where="decode.compat",
            got="eos_inside_block",
            fix="remove it",
        )
    if plan.decode.edit_threshold is not None or plan.decode.remask != "none":
        raise DareError(
            "the nodes of a tree only ever gain tokens, so edits and remasking cannot be on",
            where="decode",
            got=f"edit_threshold: {plan.decode.edit_threshold}, remask: {plan.decode.remask}",
            fix="remove edit_threshold and set remask: none",
        )
    if plan.cache in ("prefix", "dual"):
        raise DareError("trees need an exact cache", where="decode.cache", got=plan.cache, fix="set cache: auto")
