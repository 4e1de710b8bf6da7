"""Samples with everything that a rollout may record: rewards, drafts of every step, trees over the rows of a group."""

from __future__ import annotations

from dataclasses import replace

import torch

from dare.core.types import Drafts, Samples, Tree


def with_records(samples: Samples, *, seed: int = 0, vocab_size: int = 20) -> Samples:
    """Rows of a group must share prompt and length. Draft tokens are random where a step did not commit them."""
    generator = torch.Generator().manual_seed(seed)
    num = samples.canvas.batch_size
    return replace(
        samples,
        reward_B=torch.randint(0, 4, (num,), generator=generator) / 2 + samples.advantage_B,
        drafts=_drafts(samples, generator, vocab_size),
        tree=_tree(samples),
        progress=0.5,
    )


def _drafts(samples: Samples, generator: torch.Generator, vocab_size: int) -> Drafts:
    step_map_BS = samples.step_map_BS
    assert step_map_BS is not None
    pairs = [(row, step) for row, steps in enumerate(step_map_BS) for step in range(int(steps.max()) + 1)]
    sample_D, step_D = torch.tensor(pairs).T.contiguous()
    final_DS = samples.canvas.input_BS[sample_D]
    is_masked_DS = step_map_BS[sample_D] >= step_D[:, None]
    other_DS = torch.randint(0, vocab_size, final_DS.shape, generator=generator)
    is_kept_DS = step_map_BS[sample_D] == step_D[:, None]
    return Drafts(
        sample_D=sample_D,
        step_D=step_D,
        seen_DS=torch.where(is_masked_DS, samples.mask_id, final_DS),
        draft_DS=torch.where(is_masked_DS & ~is_kept_DS, other_DS, final_DS),
        logp_DS=torch.where(is_masked_DS, -torch.rand(final_DS.shape, generator=generator), 0.0),
        reward_D=torch.randint(0, 3, (len(pairs),), generator=generator) / 2,
    )


def _tree(samples: Samples) -> Tree:
    """Per group a root, one half-denoised node per two rows, and the rows as leaves."""
    input_BS, step_map_BS = samples.canvas.input_BS, samples.step_map_BS
    assert step_map_BS is not None
    is_completion_BS = samples.canvas.is_completion_BS
    states, parents, rows, is_leaf = [], [], [], []
    for group in samples.group_B.unique().tolist():
        members = (samples.group_B == group).nonzero()[:, 0].tolist()
        root = len(states)
        states.append(torch.where(is_completion_BS[members[0]], samples.mask_id, input_BS[members[0]]))
        parents.append(-1)
        rows.append(members[0])
        is_leaf.append(False)
        for start in range(0, len(members), 2):
            first = members[start]
            node = len(states)
            states.append(torch.where(step_map_BS[first] >= 2, samples.mask_id, input_BS[first]))
            parents.append(root)
            rows.append(first)
            is_leaf.append(False)
            for row in members[start : start + 2]:
                states.append(input_BS[row])
                parents.append(node)
                rows.append(row)
                is_leaf.append(True)
    return Tree(torch.stack(states), torch.tensor(parents), torch.tensor(rows), torch.tensor(is_leaf))
