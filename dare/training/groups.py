"""Which groups of a rollout are trained on, and the samples of those alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dare.core.reward_recipe import GroupRecipe
from dare.core.types import Drafts, Samples, Tree


def kept_groups(recipe: GroupRecipe, advantage_B: Tensor, is_solved_B: Tensor, group_B: Tensor, num: int) -> list[int]:
    """The first `num` groups that pass the recipe's filters, in order.

    Completions of equal reward are those that have no advantage over one another.
    """
    kept: list[int] = []
    for group in torch.unique(group_B).tolist():
        is_own_B = group_B == group
        solve_rate = float(is_solved_B[is_own_B].double().mean())
        is_dead = recipe.drop_equal and not bool((advantage_B[is_own_B] != 0).any())
        if not is_dead and recipe.min_solve_rate <= solve_rate <= recipe.max_solve_rate:
            kept.append(group)
    return kept[:num]


def select_groups(samples: Samples, groups: list[int]) -> Samples:
    """The samples of the given groups, in their order, with their drafts and trees; the canvas keeps its width."""
    is_kept_B = torch.isin(samples.group_B, torch.tensor(groups, dtype=samples.group_B.dtype))
    index_B = is_kept_B.nonzero()[:, 0]
    place_B = torch.full_like(samples.group_B, -1)
    place_B[index_B] = torch.arange(len(index_B))
    rows = {
        field.name: getattr(samples, field.name)[index_B]
        for field in dataclasses.fields(samples)
        if isinstance(getattr(samples, field.name), Tensor)
    }
    return dataclasses.replace(
        samples,
        canvas=samples.canvas.rows(index_B),
        drafts=None if samples.drafts is None else _drafts_of(samples.drafts, place_B),
        tree=None if samples.tree is None else _tree_of(samples.tree, place_B),
        **rows,
    )


def _drafts_of(drafts: Drafts, place_B: Tensor) -> Drafts:
    is_kept_D = place_B[drafts.sample_D] >= 0
    changes = {field.name: getattr(drafts, field.name)[is_kept_D] for field in dataclasses.fields(drafts)}
    return Drafts(**{**changes, "sample_D": place_B[drafts.sample_D[is_kept_D]]})


def _tree_of(tree: Tree, place_B: Tensor) -> Tree:
    """Whole trees stay or go, because the leaves of a tree are one group."""
    is_kept_N = place_B[tree.sample_N] >= 0
    place_N = torch.cumsum(is_kept_N, 0) - 1
    parent_N = tree.parent_N[is_kept_N]
    return Tree(
        state_NS=tree.state_NS[is_kept_N],
        parent_N=torch.where(parent_N < 0, parent_N, place_N[parent_N.clamp(min=0)]),
        sample_N=place_B[tree.sample_N[is_kept_N]],
        is_leaf_N=tree.is_leaf_N[is_kept_N],
    )
