"""d-TreeRPO (Pan et al. 2025, "d-TreeRPO: towards more reliable policy optimisation for diffusion language models")."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from dare.algorithms.policy import KL, Advantage, Beta, Epsilon, PolicyAlgorithm, PolicyOptions
from dare.core.lazy import torch
from dare.core.rng import Key
from dare.core.types import AuxLoss, Loss, Record, Samples, Tree, Views
from dare.diffusion.trace import is_eos
from dare.objectives import reduce
from dare.objectives.tree import node_values, sibling_advantages

if TYPE_CHECKING:
    from torch import Tensor


class DTreeRPOOptions(PolicyOptions):
    advantage: Advantage = "loo"
    eps: Epsilon = 0.4
    beta: Beta = 0.01
    kl: KL = "k3"
    branching: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="children per node at each level, their product the group size; default: two levels, as even as "
        "the group size allows",
    )
    lambda_max: float = Field(3e-3, ge=0.0, description="final weight of self-distillation; 0 = off")
    lambda_growth: float = Field(2.0, gt=0.0, description="gamma: how late in the run the weight grows")
    tau_max: float = Field(2.0, gt=0.0, description="first temperature of the weights of good siblings")
    tau_power: float = Field(0.7, gt=0.0, description="how fast that temperature falls to 0")
    variant: Literal["clean", "faithful"] = Field(
        "clean", description="clean: an only child has advantage 0; faithful: its whole value, as in the public code"
    )


class DTreeRPO(PolicyAlgorithm[DTreeRPOOptions]):
    """One view per edge of the rollout's trees: the parent's canvas, scoring what the child revealed up to its EOS.

    A node's value is the mean reward of the leaves below it, its advantage that value less the mean of its siblings'.
    Ratio and KL per token, mean over the tokens of an edge, then over edges: those with tokens (clean), or all of them
    (faithful). The log-prob of an edge is the one-shot product given the parent, though the child took many steps. On
    block models a token sees its own block as the parent had it and the child's finished blocks before it.

    Self-distillation adds lambda(p) KL(q || policy) at the parents: q mixes the tokens of the children with positive
    advantage by softmax(A / tau(p)), renormalised at each position over those that revealed it; mean over positions.
    lambda(p) = lambda_max (exp(gamma p) - 1) / (exp(gamma) - 1), tau(p) = tau_max (1 - p)^tau_power, p the progress of
    the run. On block models only the parent's current block takes part, where all siblings share one context.

    Differences from the public code: every edge of the rollout is trained in every inner iteration, instead of a few
    parents at a time from a buffer that grows stale; a token of probability 1 counts; each sibling has its own view.

    Samples need `tree` and `reward_B`; `advantage_B` is not used.
    """

    Config = DTreeRPOOptions
    compares_rewards: ClassVar[bool] = True
    needs: ClassVar[frozenset[Record]] = frozenset({"tree"})

    def branching(self, num_leaves: int) -> tuple[int, ...]:
        if self.options.branching is not None:
            return self.options.branching
        below = max(size for size in range(1, math.isqrt(num_leaves) + 1) if num_leaves % size == 0)
        return (num_leaves,) if below == 1 else (num_leaves // below, below)

    def corrupt(self, samples: Samples, key: Key) -> Views:
        tree = _tree(samples)
        node_R = _edges(tree)
        parent_RS, child_RS, sample_R = (
            tree.state_NS[tree.parent_N[node_R]],
            tree.state_NS[node_R],
            tree.sample_N[node_R],
        )
        is_completion_RS = samples.canvas.is_completion_BS[sample_R]
        is_eos_RS = (is_eos(child_RS, samples.eos_ids) & is_completion_RS).long()
        is_revealed_RS = (parent_RS == samples.mask_id) & (child_RS != samples.mask_id) & is_completion_RS
        is_target_RS = is_revealed_RS & (is_eos_RS.cumsum(-1) == is_eos_RS)
        place_R = torch.arange(len(node_R))
        return Views(
            noisy_RS=parent_RS,
            context_RS=child_RS,
            target_RS=child_RS,
            is_target_RS=is_target_RS,
            weight_RS=is_target_RS.float(),
            sample_R=sample_R,
            view_R=place_R - torch.searchsorted(sample_R, sample_R),
            temperature=self.temperature(samples),
        )

    def loss(
        self, logp_RS: Tensor, old_RS: Tensor, reference_RS: Tensor | None, views: Views, samples: Samples
    ) -> Loss:
        advantage_R = self.node_advantages(samples)[_edges(_tree(samples))]
        is_target_RS = views.is_target_RS
        anchor_RS = self.anchor(old_RS, reference_RS, views, samples)
        item_RS, metrics = self.token_loss(logp_RS.double(), old_RS, anchor_RS, advantage_R, is_target_RS)
        edge_R1 = torch.arange(views.num_views)[:, None]
        value = reduce.mean_of_means(item_RS, is_target_RS, edge_R1, views.num_views)
        if self.options.variant == "faithful":
            value = value * reduce.mean(is_target_RS.any(-1).double())
        return Loss(value, metrics)

    def node_advantages(self, samples: Samples) -> Tensor:
        """float32 [N]: of every node of the tree; 0 for roots."""
        tree, reward_B = _tree(samples), samples.reward_B
        if reward_B is None:
            raise ValueError("these samples have no rewards")
        value_N = node_values(reward_B[tree.sample_N], tree.parent_N, tree.is_leaf_N)
        only_child = "zero" if self.options.variant == "clean" else "value"
        return sibling_advantages(self.options.advantage, value_N, tree.parent_N, only_child=only_child)

    def auxiliary(self, views: Views, samples: Samples) -> AuxLoss | None:
        weight = self.distillation_weight(samples.progress)
        mixtures = self._mixtures(views, samples) if weight > 0 else None
        if mixtures is None:
            return None
        token_AC, share_AC = mixtures.token_AC, mixtures.share_AC
        # q log q, with the shares of siblings that revealed the same token added up.
        is_same_ACC = token_AC[:, :, None] == token_AC[:, None, :]
        total_AC = (is_same_ACC * share_AC[:, None, :]).sum(-1)
        negative_entropy_A = torch.where(share_AC > 0, share_AC * total_AC.clamp(min=1e-30).log(), 0.0).sum(-1)
        scale = weight / len(token_AC)

        def term(logits_CV: Tensor, entry_C: Tensor) -> Tensor:
            device = logits_CV.device
            logp = logits_CV.log_softmax(-1).gather(-1, token_AC[entry_C].to(device))
            cross_entropy_C = -(share_AC[entry_C].to(device) * logp).sum(-1)
            return scale * (cross_entropy_C + negative_entropy_A[entry_C].to(device))

        return AuxLoss(mixtures.view_A, mixtures.position_A, term, "self_distillation")

    def distillation_weight(self, progress: float) -> float:
        """lambda(p)."""
        growth = self.options.lambda_growth
        return self.options.lambda_max * math.expm1(growth * progress) / math.expm1(growth)

    def _mixtures(self, views: Views, samples: Samples) -> Mixtures | None:
        """What the policy is taught at each position of each parent; None if no child did better than its siblings."""
        tree, advantage_N = _tree(samples), self.node_advantages(samples)
        node_R = _edges(tree)
        parent_R, advantage_R = tree.parent_N[node_R], advantage_N[node_R]
        tau = self.options.tau_max * (1.0 - samples.progress) ** self.options.tau_power
        parts: list[Mixtures] = []
        num_siblings = int(torch.bincount(parent_R).max())
        for parent in torch.unique(parent_R).tolist():
            sibling_C = (parent_R == parent).nonzero()[:, 0]
            good_C = sibling_C[advantage_R[sibling_C] > 0]
            if len(sibling_C) < 2 or not len(good_C):
                continue
            is_active_CS = views.is_target_RS[good_C]
            if samples.canvas.is_blockwise:
                is_active_CS = is_active_CS & _current_block(views, samples, int(good_C[0]))
            position_A = is_active_CS.any(0).nonzero()[:, 0]
            share_C1 = (advantage_R[good_C] / tau).softmax(0)[:, None]
            share_CA = share_C1 * is_active_CS[:, position_A]
            share_AC = (share_CA / share_CA.sum(0)).T
            token_AC = torch.where(is_active_CS[:, position_A], views.target_RS[good_C][:, position_A], 0).T
            pad = (0, num_siblings - len(good_C))
            view_A = good_C[:1].expand(len(position_A))
            parts.append(
                Mixtures(
                    view_A,
                    position_A,
                    torch.nn.functional.pad(token_AC, pad),
                    torch.nn.functional.pad(share_AC, pad),
                )
            )
        mixtures = Mixtures(*(torch.cat(field) for field in zip(*parts, strict=True))) if parts else None
        return mixtures if mixtures is not None and len(mixtures.view_A) else None


class Mixtures(NamedTuple):
    """The distributions q of self-distillation: at each entry, tokens of C siblings and their shares (sum 1)."""

    view_A: Tensor
    position_A: Tensor
    token_AC: Tensor
    share_AC: Tensor


def _current_block(views: Views, samples: Samples, row: int) -> Tensor:
    """bool [S]: the block of the first masked position of a view."""
    block_S = samples.canvas.block_BS[views.sample_R[row]]
    first = (views.noisy_RS[row] == samples.mask_id).int().argmax()
    return block_S == block_S[first]


def _edges(tree: Tree) -> Tensor:
    """int64 [R]: the nodes that have a parent, by the sample below them."""
    node_R = (tree.parent_N >= 0).nonzero()[:, 0]
    return node_R[tree.sample_N[node_R].argsort(stable=True)]


def _tree(samples: Samples) -> Tree:
    if samples.tree is None:
        raise ValueError("these samples have no tree: the rollout did not branch")
    return samples.tree
