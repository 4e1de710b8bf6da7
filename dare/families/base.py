"""What a family is: a spec and a network. Everything else is shared and lives here.

Shapes: B rows, S canvas length, T queries of one call, K keys, R views, N gathered positions, V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.core.types import AuxLoss, Canvas, Views
from dare.diffusion import blocks
from dare.families.config import Config, ModelSizes
from dare.families.layers.attention import Cache, KVCache, Read, SharedContext, Visible
from dare.families.layers.head import chunk_rows, linear_logp, linear_total
from dare.families.layers.moe import ExpertLoad
from dare.families.layers.packing import Multiply, PackedWeights
from dare.families.network import Network as Network
from dare.families.reading import sources_of, states_at
from dare.families.streams import pack_streams

if TYPE_CHECKING:
    from dare.families.lora import Adapter


@dataclass(frozen=True)
class Adoption:
    """How the tensors of an autoregressive checkpoint become a family's, so that only the attention mask differs.

    rename  the checkpoint's name of a parameter -> the family's
    zeros   endings of parameters that the checkpoint does not have and that change nothing while they are 0
    """

    rename: Callable[[str], str] = str
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyType:
    """One row of the families table: how to recognise, describe and build its checkpoints.

    architecture the official class name in a config.json, shown when a checkpoint is of no known family
    matches      whether a config.json belongs to the family
    spec         from config.json and generation_config.json (None if the checkpoint has none)
    build        the network of a config.json; called on the meta device, so it must not compute with weights
    tiny_config  a config.json, in official field names, for a new model
    adopts       autoregressive layouts (rows of `dare.families.causal.LAYOUTS`) that can be converted
    """

    name: str
    architecture: str
    matches: Callable[[Config], bool]
    spec: Callable[[Config, Config | None], FamilySpec]
    build: Callable[[Config], Network]
    tiny_config: Callable[[ModelSizes], Config]
    adopts: Mapping[str, Adoption] = field(default_factory=dict)


class Family:
    """A network with everything it takes to lay out, run and score canvases. The only class that knows shifts,
    attention masks and block grids; algorithms and rollouts see canvases, views and log-probs.
    """

    def __init__(
        self,
        spec: FamilySpec,
        network: Network,
        config: Config,
        generation_config: Config | None = None,
        buffer_dtypes: Mapping[str, torch.dtype] | None = None,
        code_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """A checkpoint's network; it remembers what only a copy of that checkpoint needs.

        buffer_dtypes  how the checkpoint stores the network's buffers, which are float32 in memory
        code_files     what the checkpoint brings along for those who load it with its own code: saved again, never run
        """
        if spec.is_shifted and spec.attention == "block_causal":
            raise ValueError("a shifted block-causal family would score a block's first token from another block")
        self.spec = spec
        self.network = network
        self.config = config
        self.generation_config = generation_config
        self.buffer_dtypes = dict(buffer_dtypes or {})
        self.code_files = dict(code_files or {})
        self.packs = PackedWeights()  # those of the last rollout
        self._head: Multiply | None = None
        self.adapter: Adapter | None = None  # see `dare.families.lora`

    @property
    def dtype(self) -> torch.dtype:
        return self.network.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.network.head_weight.device

    @property
    def num_parameters(self) -> int:
        """Numbers in the network; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Family:
        """This family itself, its weights converted and moved in place."""
        self.network.to(device=device, dtype=dtype)
        return self

    def canvas(self, prompts: list[list[int]], completions: list[list[int]], block_length: int | None = None) -> Canvas:
        """Prompts and completions side by side, left-aligned, right-padded; on the CPU.

        Raises DareError naming the row that is empty, too long for the model or holds an id it does not have.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        for index, row in enumerate(rows):
            self._check_row(index, row, len(prompts[index]))
        width = max((len(row) for row in rows), default=0)
        pad_id = self.spec.pad_id
        input_BS = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]).long().view(len(rows), width)
        prompt_length_B = torch.tensor([len(prompt) for prompt in prompts]).long()
        length_B = torch.tensor([len(row) for row in rows]).long()
        column_S = torch.arange(width)
        # Padding continues the columns, so that its block ids continue the grid.
        every_BS = torch.ones_like(input_BS, dtype=torch.bool)
        is_real_BS = column_S < length_B[:, None]
        return Canvas(
            input_BS=input_BS,
            is_completion_BS=is_real_BS & (column_S >= prompt_length_B[:, None]),
            is_real_BS=is_real_BS,
            block_BS=blocks.block_ids(
                every_BS, prompt_length_B, self.spec.block_grid, self._block_length(block_length)
            ),
            attention=self.spec.attention,
        )

    def empty_canvas(self, prompts: list[list[int]], gen_length: int, block_length: int | None = None) -> Canvas:
        """Prompts followed by at least `gen_length` masked positions.

        On a "sequence" grid the completion is lengthened until prompt and completion fill whole blocks, as the
        official SDAR sampler does. On a "completion" grid `gen_length` must be whole blocks (DareError).
        """
        length = self._block_length(block_length)
        if self.spec.block_grid == "completion" and gen_length % length:
            raise DareError(
                "the completion must be whole blocks",
                where="gen_length",
                got=f"gen_length {gen_length}, block length {length}",
                fix=f"use gen_length {gen_length + -gen_length % length}, or a block length that divides {gen_length}",
            )
        completions = []
        for prompt in prompts:
            total = len(prompt) + gen_length
            filler = -total % length if self.spec.block_grid == "sequence" else 0
            completions.append([self.spec.mask_id] * (gen_length + filler))
        return self.canvas(prompts, completions, block_length)

    def logits(self, input_ids_BS: Tensor, is_real_BS: Tensor | None = None, block_length: int | None = None) -> Tensor:
        """float32 [B, S, V]: `logits[:, i]` scores the token at position i (a shift is undone).

        is_real_BS    False at padding, on either side; it changes no real position's logits. None: no padding
        block_length  another grid for a block-causal family, counted from the first real position; a
                      full-attention family has no grid and ignores it
        """
        input_BS = input_ids_BS.to(self.device)
        is_real_BS = torch.ones_like(input_BS, dtype=torch.bool) if is_real_BS is None else is_real_BS.to(self.device)
        position_BS = blocks.positions(is_real_BS)
        if self.spec.attention == "full":
            visible = blocks.full_mask(is_real_BS)
        else:
            visible = blocks.block_causal_mask(position_BS // self._block_length(block_length), is_real_BS)
        hidden_BSD = self.hidden(input_BS, position_BS, visible)
        hidden_BSD = _taken(hidden_BSD, self._sources(is_real_BS))
        return self.row_logits(hidden_BSD.flatten(0, 1)).view(*input_BS.shape, -1)

    def view_logp(
        self, views: Views, canvas: Canvas, load: ExpertLoad | None = None, *, is_packed: bool = False
    ) -> Tensor:
        """float32 [R, S] on the family's device, differentiable: log-prob of each target, nats; 0 elsewhere.

        canvas  R rows: row r lays out view r
        load    counts the experts of the real noisy tokens; a family without experts leaves it empty
        is_packed  lay the rows end to end, each a document that sees itself only, and compute no padding

        Full attention: one forward of the noisy canvas. Block-causal: one forward of [noisy | context], which
        scores every block given the context's blocks before it (BD3-LM, Arriola et al. 2025, section 3.2); views of
        one sample share the context's stream where that saves tokens (`streams.py`).
        Logits exist only at targets, one chunk at a time.
        """
        hidden_RTD = self.view_hidden(views, canvas, load, is_packed=is_packed, is_read_RS=views.is_target_RS)
        return self.target_logp(hidden_RTD, views)

    def view_hidden(
        self,
        views: Views,
        canvas: Canvas,
        load: ExpertLoad | None = None,
        *,
        is_packed: bool = False,
        is_read_RS: Tensor | None = None,
    ) -> Tensor:
        """[R, T, D], T <= S: the final hidden states that score the token of each position of the noisy stream.

        is_read_RS  bool: positions whose states will be read; elsewhere they may be 0, because the last layer computes
                    only keys and values there. None: all positions

        Columns that are padding in every row are left out: they cost time and change nothing.
        """
        if views.noisy_RS.shape != canvas.input_BS.shape:
            raise ValueError(f"views are {tuple(views.noisy_RS.shape)}, their canvas {tuple(canvas.input_BS.shape)}")
        if bool((views.is_target_RS & ~canvas.is_real_BS).any()):
            raise ValueError("padding has no log-prob: is_target_RS is True where is_real_BS is False")
        length = int(canvas.is_real_BS.any(0).sum())
        is_real_RS = canvas.is_real_BS[:, :length].to(self.device)
        noisy_RS = views.noisy_RS[:, :length].to(self.device)
        position_RS = blocks.positions(is_real_RS)
        source_RS = self._sources(is_real_RS)
        if is_read_RS is None:
            is_read_RS = is_real_RS
        else:
            is_read_RS = is_read_RS[:, :length].to(self.device)
            is_read_RS = is_read_RS if source_RS is None else sources_of(source_RS, is_read_RS)
        if canvas.is_blockwise:
            context_RS = views.context_RS[:, :length].to(self.device)
            block_RS = canvas.block_BS[:, :length].to(self.device)
            streams = (noisy_RS, context_RS, position_RS, block_RS, is_real_RS)
            hidden_RSD = self._noisy_hidden(views, *streams, is_read_RS, load, is_packed)
        else:
            real_RS, visible = is_real_RS if is_packed else None, blocks.full_mask(is_real_RS)
            masks = (is_real_RS, is_read_RS)
            hidden_RSD = states_at(self.network, noisy_RS, position_RS, visible, *masks, load, real_RS)
        return _taken(hidden_RSD, source_RS)

    def target_logp(self, hidden_RTD: Tensor, views: Views) -> Tensor:
        """The result of `view_logp` from that of `view_hidden`."""
        is_target_RT, target_N, scale = self._targets(hidden_RTD.shape[1], views)
        logp_N = linear_logp(hidden_RTD[is_target_RT], self.network.head_weight, target_N, scale)
        return _scattered(logp_N, is_target_RT, views)

    def target_total(self, hidden_RTD: Tensor, views: Views, factor_RS: Tensor) -> tuple[Tensor, Tensor]:
        """`(factor_RS * logp_RS).sum()`, differentiable, and logp_RS, the result of `target_logp`, without a graph.

        A third less work in the head than by way of `target_logp`, because the factors are known.
        """
        is_target_RT, target_N, scale = self._targets(hidden_RTD.shape[1], views)
        factor_N = factor_RS[:, : hidden_RTD.shape[1]].to(self.device)[is_target_RT]
        hidden_ND = hidden_RTD[is_target_RT]
        total, logp_N = linear_total(hidden_ND, self.network.head_weight, target_N, factor_N, scale)
        return total, _scattered(logp_N, is_target_RT, views)

    def aux_terms(self, hidden_RTD: Tensor, views: Views, aux: AuxLoss, entry_A: Tensor) -> Tensor:
        """float32 [A], differentiable: the terms of the entries `entry_A`, whose `view_A` are rows of these views.

        One chunk of logits exists at a time, in the backward too.
        """
        scale = self.network.logit_scale / views.temperature
        weight_VD = self.network.head_weight

        def chunk(hidden_CD: Tensor, entry_C: Tensor) -> Tensor:
            return aux.term((hidden_CD @ weight_VD.T).float() * scale, entry_C)

        hidden_AD = hidden_RTD[aux.view_A.to(self.device), aux.position_A.to(self.device)]
        rows = chunk_rows(self.spec.vocab_size)
        parts = zip(torch.split(hidden_AD, rows), torch.split(entry_A, rows), strict=True)
        terms = [checkpoint(chunk, hidden_CD, entry_C, use_reentrant=False) for hidden_CD, entry_C in parts]
        return torch.cat(terms)

    def _noisy_hidden(
        self,
        views: Views,
        noisy_RS: Tensor,
        context_RS: Tensor,
        position_RS: Tensor,
        block_RS: Tensor,
        is_real_RS: Tensor,
        is_read_RS: Tensor,
        load: ExpertLoad | None,
        is_packed: bool,
    ) -> Tensor:
        """[R, S, D]: hidden states of each noisy stream, read beside its clean context."""
        pack = pack_streams(views.sample_R.to(self.device), context_RS)
        if pack is None:
            ids_RT, position_RT = torch.cat([noisy_RS, context_RS], dim=1), position_RS.repeat(1, 2)
            visible = blocks.two_stream_mask(block_RS, is_real_RS)
            none_RS = torch.zeros_like(is_read_RS)
            counted_RT, read_RT = torch.cat([is_real_RS, none_RS], 1), torch.cat([is_read_RS, none_RS], 1)
            real_RT = is_real_RS.repeat(1, 2) if is_packed else None
            both = states_at(self.network, ids_RT, position_RT, visible, counted_RT, read_RT, load, real_RT)
            return both[:, : noisy_RS.shape[1]]
        first = pack.first_G
        shared = SharedContext(pack.num_streams, *blocks.shared_context_masks(block_RS[first], is_real_RS[first]))
        position_GT = position_RS[first].repeat(1, pack.num_streams + 1)
        ids_GT, is_counted_GT = pack.ids(noisy_RS, context_RS), pack.in_noisy_streams(is_real_RS)
        is_read_GT = pack.in_noisy_streams(is_read_RS)
        real_GT = None
        if is_packed:  # the clean stream and the noisy streams that are used
            real_GT = torch.cat([is_real_RS[first], is_counted_GT[:, is_real_RS.shape[1] :]], dim=1)
        hidden_GTD = states_at(self.network, ids_GT, position_GT, shared, is_counted_GT, is_read_GT, load, real_GT)
        return pack.views_of(hidden_GTD)

    def hidden(self, ids_BT: Tensor, position_BT: Tensor, visible: Visible, cache: Cache | None = None) -> Tensor:
        """Hidden states [B, T, D] after the final norm; see `Network.forward`."""
        hidden_BTD: Tensor = self.network(ids_BT, position_BT, visible, cache)
        return hidden_BTD

    def hidden_at(
        self, ids_BT: Tensor, position_BT: Tensor, visible: Visible, cache: Cache | None, read: Read
    ) -> Tensor:
        """[N, D]: the hidden states that `read` names, at the least cost."""
        hidden_1ND: Tensor = self.network(ids_BT, position_BT, visible, cache, read)
        return hidden_1ND[0]

    def row_logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]: the head applied to hidden states."""
        head = self._head  # read once: a rollout of another thread may end meanwhile
        raw_NV = hidden_ND @ self.network.head_weight.T if head is None else head(hidden_ND)
        scale = self.network.logit_scale
        return raw_NV.float() if scale == 1.0 else raw_NV.float() * scale

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Matmuls without gradients are faster while the block runs, in which no weight may change (`packing.py`)."""
        with self.packs.linears(self.network, self.network.head_weight) as self._head:
            try:
                yield
            finally:
                self._head = None

    def cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache of `length` slots for every row."""
        network = self.network
        sizes = (network.num_layers, batch_size, network.num_kv_heads, length, network.head_dim)
        return KVCache(*sizes, dtype=self.dtype, device=self.device)

    def _sources(self, is_real_BS: Tensor) -> Tensor | None:
        """int64 [B, S]: the position whose state scores the token of each position; None: its own.

        A shifted network scores token i from position i - 1, and a row's first token from itself.
        """
        if not self.spec.is_shifted:
            return None
        column_S = torch.arange(is_real_BS.shape[1], device=is_real_BS.device)
        first_B1 = is_real_BS.int().argmax(-1, keepdim=True)
        return torch.where(column_S > first_B1, column_S - 1, column_S)

    def _targets(self, length: int, views: Views) -> tuple[Tensor, Tensor, float]:
        """bool [R, T], int64 [N], float: where log-probs are asked for, of which tokens, and the logits' scale."""
        is_target_RT = views.is_target_RS[:, :length].to(self.device)
        target_N = views.target_RS[:, :length].to(self.device)[is_target_RT]
        return is_target_RT, target_N, self.network.logit_scale / views.temperature

    def _block_length(self, block_length: int | None) -> int:
        if block_length is None:
            return self.spec.block_length
        if block_length < 1:
            raise DareError("a block has at least one position", where="block_length", got=block_length)
        return block_length

    def _check_row(self, index: int, row: list[int], prompt_length: int) -> None:
        spec, where = self.spec, f"row {index}"
        if not row:
            raise DareError("a sample has neither a prompt nor a completion", where=where)
        if len(row) > spec.max_length:
            raise DareError(
                "a sample is longer than the model can address",
                where=where,
                got=f"prompt {prompt_length} + completion {len(row) - prompt_length} = {len(row)} tokens",
                expected=f"<= {spec.max_length} tokens",
                fix="shorten the prompt or the completion",
            )
        if min(row) < 0 or max(row) >= spec.vocab_size:
            raise DareError(
                "a sample holds a token id that the model does not have",
                where=where,
                got=max(row) if min(row) >= 0 else min(row),
                expected=f"0 <= id < {spec.vocab_size}",
                fix="use the tokenizer that belongs to the checkpoint",
            )


def _taken(hidden_BSD: Tensor, source_BS: Tensor | None) -> Tensor:
    """[B, S, D]: at each position the state of its source."""
    return hidden_BSD if source_BS is None else hidden_BSD.gather(1, source_BS[..., None].expand_as(hidden_BSD))


def _scattered(logp_N: Tensor, is_target_RT: Tensor, views: Views) -> Tensor:
    """float32 [R, S]: the log-probs at their targets, 0 elsewhere."""
    logp_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.float32, device=logp_N.device)
    return logp_RS.index_put(is_target_RT.nonzero(as_tuple=True), logp_N)
