"""Rows that servers returned, checked against the contract and laid out as the trace of a rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dare.core.rollout_recipe import RolloutRecipe
from dare.core.types import GIVEN, UNSAMPLED, Canvas, Missing, TraceBatch
from dare.families.base import Family
from dare.remote.contract import Answer, BadAnswer, Numbering
from dare.rollout.plan import Plan
from dare.rollout.record import empty_trace, finished


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it goes into a trace: ids, 0-based steps that go on through the row, log-probs. Cut where it ended."""

    tokens: list[int]
    steps: list[int] | None
    logp: list[float] | None


class Layout:
    """The canvas that a rollout begins with, and what its rows may look like."""

    def __init__(self, family: Family, plan: Plan, prompts: list[list[int]]) -> None:
        self.family, self.plan = family, plan
        self.canvas: Canvas = family.empty_canvas(prompts, plan.decode.gen_length, plan.block_length)
        self.blocks = [
            self.canvas.block_BS[row][self.canvas.is_completion_BS[row]].tolist() for row in range(len(prompts))
        ]

    def num_tokens(self, row: int) -> int:
        """Completion positions of a row."""
        return len(self.blocks[row])

    def checked(self, answer: Answer, row: int, numbering: Numbering, options: RolloutRecipe) -> Row:
        """The answer for a row, cut after the block in which it ended.

        Raises BadAnswer if tokens are missing or are not of the vocabulary, or if the step map is not one: as many
        steps as tokens, in each block all of 1..n with n no more than the schedule has, blocks one after the other.
        """
        tokens, blocks, spec = answer.tokens, self.blocks[row], self.family.spec
        wrong = [token for token in tokens if not 0 <= token < spec.vocab_size or token == spec.mask_id]
        if wrong:
            raise BadAnswer(f"token id {wrong[0]}, which is the mask or not in a vocabulary of {spec.vocab_size}")
        ends = [place for place, token in enumerate(tokens) if token in spec.eos_ids]
        is_cut = len(tokens) < len(blocks)
        if is_cut and (options.is_eos_ignored or not ends or ends[0] != len(tokens) - 1):
            raise BadAnswer(f"{len(tokens)} of {len(blocks)} tokens, and the row does not end with an EOS")
        steps = None
        if answer.steps is not None:
            steps = self._steps(answer.steps, blocks[: len(tokens)], numbering, is_cut=is_cut)
        length = len(tokens)
        if self.plan.has_eos_stop and ends:
            length = min(length, blocks.index(blocks[ends[0]]) + blocks.count(blocks[ends[0]]))
        logp = None if answer.logp is None else answer.logp[:length]
        return Row(tokens[:length], None if steps is None else steps[:length], logp)

    def _steps(self, raw: list[int], blocks: list[int], numbering: Numbering, *, is_cut: bool) -> list[int]:
        """0-based steps that go on through the row; a block that was cut may lack some of its steps."""
        if len(raw) != len(blocks):
            raise BadAnswer(f"the step map has {len(raw)} steps for {len(blocks)} tokens")
        steps: list[int] = []
        done = 0
        for block in dict.fromkeys(blocks):
            part = [step for step, of in zip(raw, blocks, strict=True) if of == block]
            part = [step - done for step in part] if numbering == "row" else part
            is_last_cut = is_cut and block == blocks[-1]
            limit = self._max_steps(self.plan.block_length if is_last_cut else len(part))
            if min(part) < 1 or max(part) > limit:
                raise BadAnswer(f"block {block} has steps {_span(part)} in its step map, expected 1 to {limit}")
            if not is_last_cut and set(part) != set(range(1, max(part) + 1)):
                raise BadAnswer(f"block {block} has steps {sorted(set(part))} in its step map, expected every one")
            if not is_last_cut and self._is_one_by_one and max(part) != len(part):
                raise BadAnswer(
                    f"block {block} took {max(part)} steps for {len(part)} tokens, but decode asks for one token a step"
                )
            steps += [done + step - 1 for step in part]
            done += max(part)
        return steps

    @property
    def _is_one_by_one(self) -> bool:
        decode = self.plan.decode
        return not decode.is_dynamic and decode.steps_per_block is None

    def _max_steps(self, num_masked: int) -> int:
        return num_masked if self.plan.decode.is_dynamic else min(num_masked, self.plan.num_steps)

    def trace(self, rows: Sequence[Row], sample_ids: list[int], weights_version: int) -> TraceBatch:
        """The rollout of all rows.

        Positions that a row does not reach are padding; those of its last block that the server did not return are
        still masked. What not every row has is `missing`.
        """
        trace = empty_trace(self.family, self.plan, self.canvas, sample_ids, weights_version)
        canvas = self.canvas
        has_steps = all(row.steps is not None for row in rows)
        has_logp = all(row.logp is not None for row in rows)
        for index, row in enumerate(rows):
            place_N = canvas.is_completion_BS[index].nonzero()[:, 0]
            num, blocks = len(row.tokens), self.blocks[index]
            end = len(blocks) - blocks[::-1].index(blocks[num - 1])
            if not self.plan.has_eos_stop:
                end = len(blocks)
            order = {block: step for step, block in enumerate(dict.fromkeys(blocks))}
            steps = row.steps if has_steps and row.steps is not None else [order[block] for block in blocks[:num]]
            trace.step_map_BS[index, place_N[num:end]] = UNSAMPLED
            trace.step_map_BS[index, place_N[:num]] = torch.tensor(steps)
            canvas.input_BS[index, place_N[:num]] = torch.tensor(row.tokens)
            if has_logp and row.logp is not None:
                trace.logp_BS[index, place_N[:num]] = torch.tensor(row.logp, dtype=torch.float32)
            trace.nfe_B[index] = max(steps) + 1
            self._cut(trace, index, place_N[end:])
        absent: tuple[tuple[Missing, bool], ...] = (("steps", has_steps), ("logp", has_logp))
        missing = tuple(name for name, is_there in absent if not is_there)
        return dataclasses.replace(finished(trace), missing=missing)

    def _cut(self, trace: TraceBatch, index: int, place_N: Tensor) -> None:
        canvas = trace.canvas
        canvas.input_BS[index, place_N] = self.family.spec.pad_id
        canvas.is_real_BS[index, place_N] = False
        canvas.is_completion_BS[index, place_N] = False
        trace.step_map_BS[index, place_N] = GIVEN


def _span(steps: list[int]) -> str:
    return f"{min(steps)} to {max(steps)}"
