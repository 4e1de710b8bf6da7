"""Rows to token ids: an explicit EOS policy, exact loss masks of conversations, lengths that fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from dare.core.data_recipe import DataRecipe, EosPolicy
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.text import Message
from dare.data.formats import NO_LOSS
from dare.data.read import Tally
from dare.data.rows import AnyRow, EncodedRow, Messages, PairRow, PreferencePair, Row, TextRow, TokenRow
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_messages, encode_text, generation_spans, turn_end
from dare.tasks.base import Task
from dare.training.crop import cropped

RowT = TypeVar("RowT")


class _Side(NamedTuple):
    """A completion and which of its tokens carry loss."""

    ids: list[int]
    is_scored: list[bool]


def task_rows(task: Task[Any], split: str = "train", num: int | None = None) -> list[Row]:
    """The first `num` problems of a split (None: all) with reference answers. Raises DareError if it has none."""
    rows = []
    size = task.size(split)
    for index in range(size if num is None else min(num, size)):
        prompt = task.prompt(split, index)
        if prompt.answer is None:
            raise DareError("the task has no reference answers to train on", where=prompt.uid, fix="give data.path")
        if prompt.text is not None:
            rows.append(Row(prompt.uid, prompt.uid, prompt.text, prompt.answer))
        else:
            answer = ({"role": "assistant", "content": prompt.answer},)
            rows.append(Row(prompt.uid, prompt.uid, prompt.messages or (), answer))
    return rows


class RowEncoder:
    """Rows to token ids, for one tokenizer, data recipe and family; counts in `tally` what is left out or cut."""

    def __init__(
        self,
        tokenizer: Any,
        data: DataRecipe,
        decode: Decode,
        spec: FamilySpec,
        tally: Tally | None = None,
        key: Key | None = None,
    ) -> None:
        """`key` draws which rows are cropped and to what length; without one none is."""
        self.tokenizer = tokenizer
        self.key, self.crop_rate = key, data.crop_rate
        self.spec = spec
        self.tally = Tally() if tally is None else tally
        self.eos: EosPolicy = data.eos or ("block" if spec.attention == "block_causal" else "fill")
        self.text_eos: EosPolicy = data.eos or ("block" if spec.attention == "block_causal" else "one")
        self.max_length = min(data.max_length or spec.max_length, spec.max_length)
        self.gen_length = data.gen_length or decode.gen_length
        self.block_length = decode.block_length or spec.block_length
        self.on_too_long = data.on_too_long
        self.is_skipping = data.on_bad_row == "skip"
        self.loss_roles = data.loss_roles
        self._is_known_role: dict[str, bool] = {}
        self._special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, row: AnyRow) -> list[EncodedRow]:
        """The row as ids: one, several of a long raw text, or none if it is left out.

        Everything that follows a completion carries loss. Raises DareError naming the row if it is too long, has no
        completion, holds the mask token or an id that the model does not have, unless such rows are skipped.
        """
        try:
            if isinstance(row, TextRow):
                return self._pieces(row)
            if isinstance(row, TokenRow):
                return self._labelled(row)
            if isinstance(row, PairRow):
                fix = "choose an algorithm for preferences, or name the columns prompt and completion"
                raise DareError("the row is a pair of completions", where=row.where, fix=fix)
            if row.completion is None:
                raise DareError("the row has only a prompt", where=row.where, expected="a completion to train on")
            prompt_ids, side = self._encode_side(row.where, row.prompt, row.completion)
            fitted = self._fit(row.where, prompt_ids, [self._with_eos(side, len(prompt_ids))])
        except DareError as error:
            self.skip(error)
            return []
        if fitted is None:
            return []
        prompt_ids, (side,) = fitted
        return [EncodedRow(row.uid, prompt_ids, *side)]

    def encode_pair(self, row: AnyRow) -> PreferencePair | None:
        """Both sides as ids, on the same prompt ids; None if the pair is left out. Errors as of `encode`."""
        try:
            if not isinstance(row, PairRow):
                raise DareError("the row is no pair", where=row.where, expected="columns prompt, chosen and rejected")
            prompt_ids, chosen = self._encode_side(row.where, row.prompt, row.chosen)
            other_ids, rejected = self._encode_side(row.where, row.prompt, row.rejected)
            if prompt_ids != other_ids:
                raise DareError("the chat template renders the prompt of the two sides differently", where=row.where)
            sides = [self._with_eos(side, len(prompt_ids)) for side in (chosen, rejected)]
            fitted = self._fit(row.where, prompt_ids, sides)
            if fitted is None:
                return None
            prompt_ids, sides = fitted
            if sides[0] == sides[1]:
                raise DareError("chosen and rejected are the same tokens", where=row.where, fix="remove the row")
        except DareError as error:
            self.skip(error)
            return None
        names = ("chosen", "rejected")
        ends = [EncodedRow(f"{row.uid}/{name}", prompt_ids, *side) for name, side in zip(names, sides, strict=True)]
        return PreferencePair(row.uid, *ends)

    def skip(self, error: DareError) -> None:
        """Count a row that cannot be encoded. Raises its error unless such rows are skipped."""
        if not self.is_skipping:
            raise error
        self.tally.skip(error)

    # Kinds of rows

    def _encode_side(self, where: str, prompt: str | Messages, completion: str | Messages) -> tuple[list[int], _Side]:
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids, ids = self._encode_text(where, prompt), self._encode_text(where, completion)
            side = _Side(ids, [True] * len(ids))
        elif not isinstance(prompt, str) and not isinstance(completion, str):
            prompt_ids, side = self._encode_turns(where, prompt, completion)
        else:
            raise TypeError("a prompt and its completion are both text or both messages")
        if not side.ids:
            raise DareError("the completion has no tokens", where=where)
        self._check_ids(where, [*prompt_ids, *side.ids])
        return prompt_ids, side

    def _pieces(self, row: TextRow) -> list[EncodedRow]:
        """Raw text and its EOS, cut into rows of at most `max_length` tokens, on a block grid into whole blocks."""
        if self.text_eos in ("fill", "fill_row"):
            raise DareError(
                f"eos: {self.text_eos} is for completions", where="data.eos", fix="set eos: one or none for raw text"
            )
        ids = self._encode_text(row.where, row.text)
        self._check_ids(row.where, ids)
        ids += self._eos_tail(0, ids, self.text_eos)
        unit = self.block_length if self.spec.attention == "block_causal" else 1
        size = self.max_length - (self.max_length % unit if self.max_length > unit else 0)
        rows = {f"{row.uid}/{start // size}": ids[start : start + size] for start in range(0, len(ids), size)}
        cut_rows = {uid: cropped(ids, self.crop_rate, self.key, uid, unit) for uid, ids in rows.items()}
        return [EncodedRow(uid, [], ids, [True] * len(ids)) for uid, ids in cut_rows.items()]

    def _labelled(self, row: TokenRow) -> list[EncodedRow]:
        """Ids as they come, without an EOS of our own; what follows the last token with loss is left out."""
        self._check_ids(row.where, list(row.input_ids))
        has_loss = [label != NO_LOSS for label in row.labels]
        first, end = has_loss.index(True), len(has_loss) - has_loss[::-1].index(True)
        side = _Side(list(row.input_ids[first:end]), has_loss[first:end])
        fitted = self._fit(row.where, list(row.input_ids[:first]), [side])
        if fitted is None:
            return []
        prompt_ids, (side,) = fitted
        return [EncodedRow(row.uid, prompt_ids, *side)]

    # EOS and length

    def _with_eos(self, side: _Side, num_prompt: int) -> _Side:
        tail = self._eos_tail(num_prompt, side.ids, self.eos)
        return _Side(side.ids + tail, side.is_scored + [True] * len(tail))

    def _eos_tail(self, num_prompt: int, completion_ids: list[int], policy: EosPolicy) -> list[int]:
        """The EOS tokens that the policy adds; a chat template may have written the first one."""
        eos = [self.spec.eos_ids[0]]
        if policy == "none":
            return []
        if policy == "fill":
            return eos * (self.gen_length - len(completion_ids))
        if policy == "fill_row":
            return eos * (self.max_length - num_prompt - len(completion_ids))
        is_complete = bool(completion_ids) and completion_ids[-1] in self.spec.eos_ids
        tail = [] if is_complete or policy == "align" else eos
        if policy == "one":
            return tail
        end = len(completion_ids) + len(tail) + (num_prompt if self.spec.block_grid == "sequence" else 0)
        return tail + eos * (-end % self.block_length)

    def _fit(self, where: str, prompt_ids: list[int], sides: list[_Side]) -> tuple[list[int], list[_Side]] | None:
        """The prompt and its completions within the limits, as `on_too_long` says; None if they are dropped."""
        longest = max(len(side.ids) for side in sides)
        room = self._room(len(prompt_ids))
        if longest <= room:
            return prompt_ids, sides
        error = self._too_long(where, len(prompt_ids), longest)
        if self.on_too_long == "drop":
            self.tally.num_dropped += 1
            return None
        if self.on_too_long == "left":
            # By whole blocks, so that completions keep their places on a grid that begins with the sequence.
            unit = self.block_length if self.spec.block_grid == "sequence" else 1
            cut = -((room - longest) // unit) * unit
            if cut > len(prompt_ids) or longest > self._room(len(prompt_ids) - cut):
                raise error
            prompt_ids = prompt_ids[cut:]
        elif self.on_too_long == "right":
            sides = [_Side(side.ids[:room], side.is_scored[:room]) for side in sides]
            if room <= 0 or not all(any(side.is_scored) for side in sides):
                raise error
        else:
            raise error
        self.tally.num_truncated += 1
        return prompt_ids, sides

    def _room(self, num_prompt: int) -> int:
        room = self.max_length - num_prompt
        return min(room, self.gen_length) if self.eos == "fill" else room

    def _too_long(self, where: str, num_prompt: int, num_completion: int) -> DareError:
        limit = f"max_length {self.max_length}"
        if self.eos == "fill":
            limit += f" and gen_length {self.gen_length} (eos: fill)"
        return DareError(
            "the row is too long",
            where=where,
            got=f"prompt {num_prompt} + completion {num_completion} tokens",
            expected=f"within {limit}",
            fix="raise the limit, shorten the row, or set data.on_too_long to drop, right or left",
        )

    def _check_ids(self, where: str, ids: list[int]) -> None:
        if self.spec.mask_id in ids:
            raise DareError("the row holds the mask token, which stands for what is unknown", where=where)
        wrong = next((token for token in ids if not 0 <= token < self.spec.vocab_size), None)
        if wrong is not None:
            raise DareError(
                "the row holds a token id that the model does not have",
                where=where,
                got=wrong,
                expected=f"0 <= id < {self.spec.vocab_size}",
                fix="use the tokenizer that belongs to the checkpoint",
            )

    # Text and conversations

    def _encode_text(self, where: str, text: str) -> list[int]:
        try:
            return encode_text(self.tokenizer, text)
        except DareError as error:
            raise error.inside(where) from None

    def _encode_turns(self, where: str, prompt: Messages, completion: Messages) -> tuple[list[int], _Side]:
        """Prompt ids and the completion of a conversation.

        A turn with loss is what the chat template writes between the open header of the assistant and the token that
        ends the turn; white space that follows that token is neither generated nor trained. Turns are found by
        rendering the conversation up to them, never by searching text. A template that rewrites earlier turns has to
        mark what the assistant says with `{% generation %}`.
        """
        conversation = [*prompt, *completion]
        for index, message in enumerate(conversation):
            self._check_role(where, message["role"], conversation, index)
        num_turns = sum(message["role"] in self.loss_roles for message in completion)
        found = self._scored_turns(where, conversation, len(prompt))
        ids, is_scored = found or self._marked_turns(where, conversation, num_turns)
        if True not in is_scored:
            raise DareError("the completion has no tokens", where=where)
        first = is_scored.index(True)
        return ids[:first], _Side(ids[first:], is_scored[first:])

    def _check_role(self, where: str, role: str, conversation: Sequence[Message], index: int) -> None:
        """A template may refuse a role, which is an error by itself, or leave its messages out without a word."""
        if role not in self._is_known_role:
            rest = [*conversation[:index], *conversation[index + 1 :]]
            whole = self._render(where, conversation, is_open=False)
            try:
                self._is_known_role[role] = not rest or whole != self._render(where, rest, is_open=False)
            except DareError:  # the rest alone is no conversation, so the message counted
                self._is_known_role[role] = True
        if not self._is_known_role[role]:
            raise DareError(f"the chat template leaves out messages of the role '{role}'", where=where)

    def _scored_turns(
        self, where: str, conversation: Sequence[Message], num_given: int
    ) -> tuple[list[int], list[bool]] | None:
        """Ids through the last turn, and which carry loss; None if the template rewrites earlier turns."""
        ids: list[int] = []
        is_scored: list[bool] = []
        for index in range(num_given, len(conversation)):
            role = conversation[index]["role"]
            if role not in self.loss_roles:
                continue
            closed = self._render(where, conversation[: index + 1], is_open=False)
            is_always_open = closed == self._render(where, conversation[: index + 1], is_open=True)
            if role == "assistant":
                opened = self._render(where, conversation[:index], is_open=True)
                if closed[: len(opened)] != opened:
                    return None
            else:
                before = self._render(where, conversation[:index], is_open=False) if index else []
                opened = closed[: _num_common(before, closed)]
            if opened[: len(ids)] != ids:
                return None
            end = turn_end(opened, closed, self._special_ids, is_always_open=is_always_open)
            is_scored += [False] * (len(opened) - len(ids)) + [True] * (end - len(opened))
            ids = closed[:end]
        return ids, is_scored

    def _marked_turns(self, where: str, conversation: Sequence[Message], num: int) -> tuple[list[int], list[bool]]:
        """The last `num` turns that the template marks; the special token after a mark ends its turn."""
        spans = None
        if self.loss_roles == ("assistant",):
            spans = generation_spans(self.tokenizer, conversation, where=where)
        if spans is None:
            raise DareError(
                "the chat template rewrites earlier turns, so a turn's tokens cannot be found",
                where=where,
                fix="set data.loss_turns to last, mark the assistant's turns in the template with "
                "{% generation %}, or give prompt and completion as text",
            )
        ids, marks = spans
        is_scored = [False] * len(ids)
        end = 0
        for start, stop in marks[-num:]:
            end = stop + 1 if stop < len(ids) and ids[stop] in self._special_ids else stop
            is_scored[start:end] = [True] * (end - start)
        return ids[:end], is_scored[:end]

    def _render(self, where: str, messages: Sequence[Message], *, is_open: bool) -> list[int]:
        return encode_messages(self.tokenizer, messages, is_open=is_open, where=where)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def encode_rows(
    tokenizer: Any,
    rows: Iterable[AnyRow],
    data: DataRecipe,
    decode: Decode,
    spec: FamilySpec,
    tally: Tally | None = None,
) -> list[EncodedRow]:
    """All rows as ids, in order; there may be fewer where rows are left out, and more of long raw texts.

    Raises DareError naming the first row that cannot be encoded, or if none is left.
    """
    encoder = RowEncoder(tokenizer, data, decode, spec, tally)
    return require_rows([found for row in rows for found in encoder.encode(row)], encoder.tally)


def encode_pairs(
    tokenizer: Any,
    rows: Iterable[AnyRow],
    data: DataRecipe,
    decode: Decode,
    spec: FamilySpec,
    tally: Tally | None = None,
) -> list[PreferencePair]:
    """All preference rows as ids, in order. Errors as of `encode_rows`."""
    encoder = RowEncoder(tokenizer, data, decode, spec, tally)
    return require_rows([found for row in rows if (found := encoder.encode_pair(row)) is not None], encoder.tally)


def require_rows(found: list[RowT], tally: Tally) -> list[RowT]:
    """`found` itself. Raises DareError with the reason if it is empty."""
    if found:
        return found
    if tally.errors:
        raise DareError(
            "no row is left", where="data.on_bad_row", got=f"{tally.num_bad} malformed rows"
        ) from tally.errors[0]
    raise DareError(
        "every row is too long",
        where="data.on_too_long",
        got=f"{tally.num_dropped} rows dropped",
        fix="raise max_length",
    )


def inspect_row(tokenizer: Any, encoded: EncodedRow) -> list[tuple[str, bool, bool]]:
    """(text, is_prompt, has_loss) of every token, special tokens visible."""
    prompt = [(index, True, False) for index in encoded.prompt_ids]
    completion = [(i, False, has_loss) for i, has_loss in zip(encoded.completion_ids, encoded.is_scored, strict=True)]
    return [
        (decode_text(tokenizer, [index], has_special=True), is_prompt, has_loss)
        for index, is_prompt, has_loss in prompt + completion
    ]
