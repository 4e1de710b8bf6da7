"""What a recipe's rows become, without training: tokens, noise, lengths, what is left out, what padding would cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from dare.core.data_recipe import DataRecipe
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key, stable_id
from dare.core.spec import FamilySpec
from dare.core.text import Prompt
from dare.core.types import Canvas, Samples
from dare.data.order import row_indices
from dare.data.packing import packs, padding_share
from dare.data.read import Tally, iterate_rows
from dare.data.rows import AnyRow, EncodedRow, Messages, PairRow, Row
from dare.diffusion import corrupt
from dare.families.build import family_spec
from dare.families.tokenizer import decode, encode_prompt
from dare.tasks.base import Task
from dare.training.data import RowEncoder
from dare.training.feed import text_sources
from dare.training.run import model_tokenizer, with_checkpoint

_PACK_LENGTH = 4096  # where a recipe does not pack yet


@dataclass(frozen=True)
class Inspection:
    """One epoch of encoded rows, or its beginning; a pair counts as two rows, and a prompt alone has no completion.

    tally      what was left out or cut
    is_whole   whether all rows were read
    """

    tokenizer: Any
    spec: FamilySpec
    rows: list[EncodedRow]
    tally: Tally
    is_whole: bool

    def token_text(self, token: int) -> str:
        """How a token reads, special ones too."""
        return decode(self.tokenizer, [token], has_special=True)

    def lengths(self) -> dict[str, list[int]]:
        """Tokens of each row's parts; of prompts alone only of those."""
        prompts = [len(row.prompt_ids) for row in self.rows]
        if not any(row.completion_ids for row in self.rows):
            return {"prompt": prompts}
        completions = [len(row.completion_ids) for row in self.rows]
        return {"prompt": prompts, "completion": completions, "whole row": [row.num_tokens for row in self.rows]}


@dataclass(frozen=True)
class Padding:
    """What the positions of an epoch cost.

    padded_share  share of padding when each micro-batch is as wide as its longest row
    num_batches   of those micro-batches
    num_packs     forwards when rows are laid end to end, which leaves no padding
    pack_length   tokens of one of those
    """

    padded_share: float
    num_batches: int
    num_packs: int
    pack_length: int


def inspect_data(recipe: Recipe, max_rows: int) -> Inspection:
    """The first `max_rows` rows of a recipe as an offline run would train on them; no weights are loaded.

    Raises DareError as training would, and if no row is left.
    """
    recipe = with_checkpoint(recipe)
    task: Task[Any] | None = recipe.task.build(recipe.seed) if recipe.task else None
    tally = Tally()
    has_pairs = recipe.algorithm.type.row_kind != "completions"
    sources = text_sources(recipe, task, tally, has_pairs=has_pairs)
    tokenizer = model_tokenizer(recipe, task, sources)
    spec = family_spec(recipe.model, tokenizer)
    key = Key(recipe.seed).fold("rows")
    encoder = RowEncoder(tokenizer, recipe.data or DataRecipe(), recipe.decode, spec, tally, key)
    rows = (row for source in sources for row in source.read(tally))
    encoded = _encoded(encoder, rows)
    found = list(islice(encoded, max_rows))
    if not found:
        first = tally.errors[0] if tally.errors else None
        raise DareError("no row is left", got="; ".join(tally.warnings())) from first
    return Inspection(tokenizer, spec, found, tally, is_whole=next(encoded, None) is None)


def _encoded(encoder: RowEncoder, rows: Iterable[AnyRow]) -> Iterator[EncodedRow]:
    for row in rows:
        if isinstance(row, PairRow):
            pair = encoder.encode_pair(row)
            if pair is not None:
                yield pair.chosen
                yield pair.rejected
        elif isinstance(row, Row) and row.completion is None:
            yield from _encoded_prompt(encoder, row.uid, row.where, row.prompt)
        else:
            yield from encoder.encode(row)


def _encoded_prompt(encoder: RowEncoder, uid: str, where: str, prompt: str | Messages) -> list[EncodedRow]:
    text, messages = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    try:
        return [EncodedRow(uid, encode_prompt(encoder.tokenizer, Prompt(where, text, messages)), [], [])]
    except DareError as error:
        encoder.skip(error if messages is not None else error.inside(where))
        return []


def noisy_copies(row: EncodedRow, spec: FamilySpec, times: Iterable[float], key: Key) -> list[list[int]]:
    """The row's ids at each noise level, masked as training would: scored tokens with probability t each.

    The draws are shared, so that what is masked at one level is masked at all higher ones.
    """
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    is_completion_BS = torch.arange(ids.shape[1])[None] >= len(row.prompt_ids)
    is_real_BS = torch.ones_like(is_completion_BS)
    # The level is given, so the grid does not matter.
    canvas = Canvas(ids, is_completion_BS, is_real_BS, torch.zeros_like(ids), attention="full")
    is_scored_BS = torch.zeros_like(is_completion_BS)
    is_scored_BS[0, len(row.prompt_ids) :] = torch.tensor(row.is_scored, dtype=torch.bool)
    samples = Samples(
        canvas=canvas,
        is_scored_BS=is_scored_BS,
        sample_id_B=torch.tensor([stable_id(row.uid)]),
        advantage_B=torch.zeros(1),
        group_B=torch.zeros(1, dtype=torch.int64),
        mask_id=spec.mask_id,
    )
    views = (corrupt.bernoulli(samples, key, num_views=1, t_min=time, t_max=time) for time in times)
    return [view.noisy_RS[0].tolist() for view in views]


def padding_of(recipe: Recipe, rows: list[EncodedRow]) -> Padding:
    """What padding costs in an epoch of `rows` in the order and batches of the recipe."""
    train, lengths = recipe.train, [row.num_tokens for row in rows]
    key = Key(recipe.seed).fold("rows")
    pack_length = train.pack_length or max(_PACK_LENGTH, *lengths)
    batches, num_packs = [], 0
    for step in range(len(rows) // train.batch_size or 1):
        batch = row_indices(len(rows), min(train.batch_size, len(rows)), step, key)
        starts = range(0, len(batch), train.micro_batch_views)
        batches += [batch[start : start + train.micro_batch_views] for start in starts]
        num_packs += len(packs([lengths[index] for index in batch], pack_length))
    return Padding(padding_share(lengths, batches), len(batches), num_packs, pack_length)


def check_data(data: DataRecipe, max_errors: int, encoder: RowEncoder | None = None) -> Tally:
    """Every row of the sources read and checked, and encoded if there is an encoder; the first errors are kept.

    Raises DareError for a source that cannot be read at all.
    """
    tally = Tally(max_errors=max_errors)
    if encoder is not None:
        encoder.tally, encoder.is_skipping = tally, True
    for source in data.all_sources:
        for row in iterate_rows(data, source, tally, is_skipping=True):
            if encoder is not None:
                for _ in _encoded(encoder, [row]):
                    pass
    return tally
