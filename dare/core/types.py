"""The tensors that cross borders. Axes: B samples, S canvas length, R views, K block length, V vocabulary.

Canvas rule: left-aligned, right-padded. A completion is found by `is_completion_BS`, never by slicing at a
column. Padding never changes a real position's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dare.core.lazy import torch
from dare.core.predictions import Predictions

if TYPE_CHECKING:
    from torch import Tensor

GIVEN = -1  # step map: the position was never masked (prompt, padding)
Record = Literal["drafts", "tree"]  # what a rollout records only where an algorithm asks for it
Missing = Literal["steps", "logp"]  # what a rollout server may not return
UNSAMPLED = -2  # step map: still masked when the rollout ended


def _check(owner: object, shape: tuple[int, ...], **fields: tuple[Tensor, Any]) -> None:
    for name, (value, dtype) in fields.items():
        if tuple(value.shape) != shape or value.dtype != dtype:
            kind = type(owner).__name__
            raise ValueError(f"{kind}.{name}: got {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")


@dataclass
class Canvas:
    """Prompt + completion positions of B samples.

    input_BS         int64  token ids; masked positions hold the mask id, padding the pad id
    is_completion_BS bool   positions that a rollout may fill (terminal-block suffix included)
    is_real_BS       bool   False at padding, which no real position attends to
    block_BS         int64  block index on the family's grid; -1 before the first completion block of a
                            completion grid; padding continues the grid and is hidden by is_real_BS
    attention        "full" every real position sees every other; "block_causal" position i sees j iff
                     block(j) <= block(i): such samples are scored with a clean second stream
    """

    input_BS: Tensor
    is_completion_BS: Tensor
    is_real_BS: Tensor
    block_BS: Tensor
    attention: Literal["full", "block_causal"]

    def __post_init__(self) -> None:
        shape = (int(self.input_BS.shape[0]), int(self.input_BS.shape[1]))
        long, boolean = torch.int64, torch.bool
        _check(
            self,
            shape,
            input_BS=(self.input_BS, long),
            is_completion_BS=(self.is_completion_BS, boolean),
            is_real_BS=(self.is_real_BS, boolean),
            block_BS=(self.block_BS, long),
        )

    @property
    def batch_size(self) -> int:
        return int(self.input_BS.shape[0])

    @property
    def length(self) -> int:
        return int(self.input_BS.shape[1])

    def rows(self, index: Tensor | slice) -> Canvas:
        """The chosen rows, in that order."""
        return Canvas(
            input_BS=self.input_BS[index],
            is_completion_BS=self.is_completion_BS[index],
            is_real_BS=self.is_real_BS[index],
            block_BS=self.block_BS[index],
            attention=self.attention,
        )

    @property
    def is_blockwise(self) -> bool:
        """Whether blocks are scored independently given the clean blocks before them."""
        return self.attention == "block_causal"


@dataclass
class Edits:
    """Tokens that a rollout committed and later replaced: E entries, ordered by row, step of replacement, position.

    row_E       int64   row of the trace
    position_E  int64   position in its canvas
    token_E     int64   the token that was replaced
    since_E     int64   the row's denoising step that had written it
    until_E     int64   the row's denoising step that replaced it
    logp_E      float32 its log-prob when it was written, as in `TraceBatch.logp_BS`
    """

    row_E: Tensor
    position_E: Tensor
    token_E: Tensor
    since_E: Tensor
    until_E: Tensor
    logp_E: Tensor

    def __post_init__(self) -> None:
        shape, long = (int(self.row_E.shape[0]),), torch.int64
        _check(self, shape, row_E=(self.row_E, long), position_E=(self.position_E, long))
        _check(self, shape, token_E=(self.token_E, long), since_E=(self.since_E, long), until_E=(self.until_E, long))
        _check(self, shape, logp_E=(self.logp_E, torch.float32))

    @classmethod
    def joined(cls, parts: Sequence[Edits]) -> Edits:
        """All entries of `parts`, in order of row, replacement and position."""
        fields = [field.name for field in dataclasses.fields(cls)]
        if not parts:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(none, none, none, none, none, none.float())
        all_E = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
        order_E = torch.arange(len(all_E["row_E"]), device=all_E["row_E"].device)
        for name in ("position_E", "until_E", "row_E"):  # stable sorts, the last one is the major key
            order_E = order_E[all_E[name][order_E].argsort(stable=True)]
        return cls(**{name: value[order_E] for name, value in all_E.items()})


@dataclass
class Drafts:
    """What every denoising step of a rollout saw and predicted: D steps of all samples, in any order.

    sample_D   int64   row of the batch
    step_D     int64   0-based denoising step of that row
    seen_DS    int64   the canvas that the step read, bit for bit, also where tokens were masked again later
    draft_DS   int64   that canvas with every masked position that the step predicted filled in; a block model predicts
                       its current block only, so later positions still hold the mask id
    logp_DS    float32 log-prob of each predicted token, as in `TraceBatch.logp_BS`; 0 elsewhere
    reward_D   float32 reward of the drafted completion; zeros until the trainer has judged it
    """

    sample_D: Tensor
    step_D: Tensor
    seen_DS: Tensor
    draft_DS: Tensor
    logp_DS: Tensor
    reward_D: Tensor

    def __post_init__(self) -> None:
        shape, long = tuple(self.seen_DS.shape), torch.int64
        _check(self, shape, seen_DS=(self.seen_DS, long), draft_DS=(self.draft_DS, long))
        _check(self, shape, logp_DS=(self.logp_DS, torch.float32))
        rows = (shape[0],)
        _check(self, rows, sample_D=(self.sample_D, long), step_D=(self.step_D, long))
        _check(self, rows, reward_D=(self.reward_D, torch.float32))


@dataclass
class Tree:
    """Branching rollouts: N nodes, each a canvas that was denoised from its parent's; parents come before children.

    state_NS   int64 the canvas; what is not yet sampled holds the mask id
    parent_N   int64 the node's parent; -1 for a root
    sample_N   int64 a row of the batch below the node: a leaf is that row, an inner node one of its ancestors
    is_leaf_N  bool
    """

    state_NS: Tensor
    parent_N: Tensor
    sample_N: Tensor
    is_leaf_N: Tensor

    def __post_init__(self) -> None:
        shape, long = tuple(self.state_NS.shape), torch.int64
        _check(self, shape, state_NS=(self.state_NS, long))
        _check(self, (shape[0],), parent_N=(self.parent_N, long), sample_N=(self.sample_N, long))
        _check(self, (shape[0],), is_leaf_N=(self.is_leaf_N, torch.bool))


@dataclass
class TraceBatch:
    """What a rollout remembers: enough to rebuild every canvas it saw, bit for bit.

    canvas       the final canvas (positions never sampled still hold the mask id)
    step_map_BS  int64   0-based denoising step (of that row) at which the position took its final value;
                         GIVEN where it was never masked, UNSAMPLED where it still is
    logp_BS      float32 log-prob of the committed token on the canvas it was committed from, nats: full
                         softmax of logits / temperature (temperature 1 when greedy), before top-k/top-p
                         and with the mask token in the normaliser; i.e. what a trainer scores. 0 elsewhere
    nfe_B        int64   denoising forwards the row took part in
    is_eos_B     bool    whether the completion contains an EOS token (else it ran to its full length)
    sample_id_B  int64   stable ids that key the randomness
    temperature  the temperature that was sampled (0 = greedy)
    edits        tokens that were replaced after they had been committed; None unless the rollout could edit
    is_exact     False if an approximation was on (stale caches); its name is in `decode`
    decode       the decode options as plain data
    drafts       every step's full prediction; only where asked for
    tree         the tree whose leaves the rows are; only of a branching rollout
    predictions  what every step thought of its open positions; only where asked for
    missing      what a rollout server did not return. steps: every token counts as committed in the first step of its
                 block, so that nfe_B counts blocks; logp: zeros
    """

    canvas: Canvas
    step_map_BS: Tensor
    logp_BS: Tensor
    nfe_B: Tensor
    is_eos_B: Tensor
    sample_id_B: Tensor
    mask_id: int
    eos_ids: tuple[int, ...]
    temperature: float
    is_exact: bool = True
    weights_version: int = 0
    decode: Mapping[str, Any] = field(default_factory=dict)
    edits: Edits | None = None
    drafts: Drafts | None = None
    tree: Tree | None = None
    predictions: Predictions | None = None
    missing: tuple[Missing, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.canvas.input_BS.shape)
        _check(self, shape, step_map_BS=(self.step_map_BS, torch.int64), logp_BS=(self.logp_BS, torch.float32))
        rows = (shape[0],)
        _check(self, rows, nfe_B=(self.nfe_B, torch.int64), is_eos_B=(self.is_eos_B, torch.bool))
        _check(self, rows, sample_id_B=(self.sample_id_B, torch.int64))


@dataclass
class Judgement:
    """What a critic says about the tokens of rollouts; 0 where a token is not trained.

    value_BS      float32 the critic's value before the update
    return_BS     float32 what the value should have been
    advantage_BS  float32 per token
    """

    value_BS: Tensor
    return_BS: Tensor
    advantage_BS: Tensor

    def __post_init__(self) -> None:
        shape, single = tuple(self.value_BS.shape), torch.float32
        _check(self, shape, value_BS=(self.value_BS, single), return_BS=(self.return_BS, single))
        _check(self, shape, advantage_BS=(self.advantage_BS, single))


@dataclass
class Samples:
    """What an algorithm trains on: rollouts or dataset rows.

    is_scored_BS    bool    completion positions through the first EOS (the response mask); for dataset rows
                            the positions that carry loss
    sample_id_B     int64   stable ids that key the corruption
    advantage_B     float32 zeros for dataset rows
    group_B         int64   samples of one prompt share a group; the two sides of a preference pair do
    step_map_BS     int64   None for dataset rows
    rollout_logp_BS float32 the rollout's own log-probs at commit; None for dataset rows
    is_rewritten    whether the rollout changed tokens after it had committed them, so that the step map does not say
                    what each step read
    eos_ids         what ends a completion
    reward_B        float32 rewards of rollouts; of preference rows 1 (preferred) or 0; None for other dataset rows
    drafts, tree    of the rollout, where the algorithm asked for them
    progress        share of the run's steps that were done before this batch, in [0, 1)
    judgement       what the critic made of the rollout, where the algorithm has one
    """

    canvas: Canvas
    is_scored_BS: Tensor
    sample_id_B: Tensor
    advantage_B: Tensor
    group_B: Tensor
    mask_id: int
    step_map_BS: Tensor | None = None
    rollout_logp_BS: Tensor | None = None
    rollout_temperature: float = 1.0
    is_rewritten: bool = False
    eos_ids: tuple[int, ...] = ()
    reward_B: Tensor | None = None
    drafts: Drafts | None = None
    tree: Tree | None = None
    progress: float = 0.0
    judgement: Judgement | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.canvas.input_BS.shape)
        _check(self, shape, is_scored_BS=(self.is_scored_BS, torch.bool))
        rows = (shape[0],)
        _check(self, rows, sample_id_B=(self.sample_id_B, torch.int64), group_B=(self.group_B, torch.int64))
        _check(self, rows, advantage_B=(self.advantage_B, torch.float32))


@dataclass
class Views:
    """Corrupted copies of samples with the positions to score. Views are data: drawn once, scored by all.

    noisy_RS     int64   the network's input: masked positions hold the mask id
    context_RS   int64   the clean stream that blocks before the noisy one are read from (block-causal
                         samples only; equal to the sample unless the algorithm corrupts the context too)
    target_RS    int64   token ids to score
    is_target_RS bool    where to score
    weight_RS    float32 the plan's weight of each scored log-prob; 0 where is_target_RS is False
    sample_R     int64   row of `Samples` that the view belongs to
    view_R       int64   index of the view within its sample (0-based)
    predicted_RS int64   the policy's most likely token at each target before the update, -1 where not asked for; None
                         unless the algorithm has predictions
    """

    noisy_RS: Tensor
    context_RS: Tensor
    target_RS: Tensor
    is_target_RS: Tensor
    weight_RS: Tensor
    sample_R: Tensor
    view_R: Tensor
    temperature: float = 1.0  # logits are divided by it before the softmax
    predicted_RS: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.noisy_RS.shape)
        long = torch.int64
        _check(
            self,
            shape,
            noisy_RS=(self.noisy_RS, long),
            context_RS=(self.context_RS, long),
            target_RS=(self.target_RS, long),
            is_target_RS=(self.is_target_RS, torch.bool),
            weight_RS=(self.weight_RS, torch.float32),
        )
        _check(self, (shape[0],), sample_R=(self.sample_R, long), view_R=(self.view_R, long))

    @property
    def num_views(self) -> int:
        return int(self.noisy_RS.shape[0])

    def rows(self, index: Tensor | slice) -> Views:
        """The chosen views, in that order."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "temperature"}
        changes: dict[str, Any] = {name: None if column is None else column[index] for name, column in columns.items()}
        return dataclasses.replace(self, **changes)


@dataclass
class Metric:
    """A mean with its denominator kept, so that means of parts add up to the mean of the whole."""

    total: float
    count: float

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class AuxLoss:
    """A loss on full-vocabulary logits at few positions, added to the loss of the same optimizer step.

    It is a sum of independent terms, one per entry, so an engine may evaluate it in chunks inside the replay, with one
    chunk of logits in memory. Denominators belong to the whole batch and are inside the terms.

    view_A      int64 row of the `Views` whose logits are read
    position_A  int64 the position in it
    term        (logits / temperature float32 [C, V], entries int64 [C]) -> float [C], differentiable; the temperature
                is that of the views
    value_A     float32 the terms, written by the engine when it has evaluated them
    name        under which the sum is reported
    """

    view_A: Tensor
    position_A: Tensor
    term: Callable[[Tensor, Tensor], Tensor]
    name: str
    value_A: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape, long = tuple(self.view_A.shape), torch.int64
        _check(self, shape, view_A=(self.view_A, long), position_A=(self.position_A, long))
        self.value_A = torch.zeros(shape)


@dataclass
class Loss:
    """`value` is a 0-d tensor on the graph of the log-probs; metrics are detached."""

    value: Tensor
    metrics: dict[str, Metric] = field(default_factory=dict)
