"""Answers and chunks of a stream, in the shapes of the OpenAI API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from dare.families.tokenizer import token_piece
from dare.serve.errors import ApiError
from dare.serve.scheduler import RowJob
from dare.serve.schema import Generation
from dare.serve.service import Ask, Service
from dare.serve.ticket import CanvasNow
from dare.serve.transcript import Cut, Transcript

_DONE = b"data: [DONE]\n\n"


class Shape(NamedTuple):
    """How an endpoint names things."""

    prefix: str
    whole: str
    chunk: str
    is_chat: bool


COMPLETION = Shape("cmpl-", "text_completion", "text_completion", False)
CHAT = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", True)


class Answer:
    """The answer to one request, whole or in chunks.

    A row is given up once no later token can change what the client gets of it, unless the client asked for details,
    which say how the whole row went.
    """

    def __init__(self, service: Service, body: Generation, ask: Ask, jobs: Sequence[RowJob], shape: Shape) -> None:
        self._service, self._body, self._ask, self._jobs, self._shape = service, body, ask, jobs, shape
        self._ticket = jobs[0].ticket
        self._ended: dict[int, Cut] = {}  # rows of which everything is known
        self._num_seen = [0] * len(jobs)  # settled tokens that have been looked at
        self.id = f"{shape.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer, when all rows have ended."""
        while len(self._ended) < len(self._jobs):
            await self._ticket.news()
            for index in range(len(self._jobs)):
                await self._look(index)
        choices = [self._choice(index, self._ended[index]) for index in range(len(self._jobs))]
        return {**self._head(self._shape.whole), "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events: pieces of text as blocks are complete, canvases if asked for, then [DONE]."""
        rows = range(len(self._jobs))
        transcripts = [Transcript(self._ask.stops) for _ in rows]
        canvases: list[CanvasNow | None] = [None for _ in rows]
        if self._shape.is_chat:
            for index in rows:
                yield self._chunk([self._delta(index, "", is_first=True)])
        try:
            while len(self._ended) < len(self._jobs):
                await self._ticket.news()
                for index in rows:
                    canvas = self._ticket.canvases[index]
                    if canvas is not None and canvas is not canvases[index]:
                        canvases[index] = canvas
                        yield await self._canvas_chunk(index, canvas)
                    found = await self._look(index)
                    if found is not None:
                        for chunk in self._grow(index, found, transcripts[index]):
                            yield chunk
        except ApiError as error:
            yield event(error.body)
            return
        if self._body.has_usage_chunk:
            yield self._chunk([], {"usage": self._usage()})
        yield _DONE

    async def _look(self, index: int) -> Cut | None:
        """What is known of a row by now; None if it has ended before, or nothing is new."""
        completion, settled = self._ticket.completions[index], self._ticket.settled[index]
        if index in self._ended or (completion is None and len(settled) == self._num_seen[index]):
            return None
        self._num_seen[index] = len(settled)
        tokens = settled if completion is None else completion.tokens
        found = await self._service.text(lambda: self._service.cut(self._ask, tokens))
        if completion is not None or (found.is_final and not self._body.dare.details):
            self._ended[index] = found
            self._service.scheduler.give_up([self._jobs[index]])
        return found

    def _grow(self, index: int, found: Cut, transcript: Transcript) -> list[bytes]:
        """The chunks with what is new in a row, and its end."""
        has_ended = index in self._ended
        piece = transcript.grow(found.text, is_final=has_ended)
        chunks = [self._chunk([self._delta(index, piece)])] if piece else []
        if has_ended:
            last = self._delta(index, "", finish_reason=found.finish_reason)
            chunks.append(self._chunk([{**last, **self._details(index, found)}]))
        return chunks

    async def _canvas_chunk(self, index: int, canvas: CanvasNow) -> bytes:
        mask_id, tokenizer = self._service.model.family.spec.mask_id, self._service.model.tokenizer
        ids = [None if token == mask_id else token for token in canvas.tokens]
        pieces = await self._service.text(
            lambda: [None if token is None else token_piece(tokenizer, token) for token in ids]
        )
        shown = {"index": index, "step": canvas.step, "token_ids": ids, "pieces": pieces}
        return self._chunk([], {"dare": {"canvas": shown}})

    def _choice(self, index: int, found: Cut) -> dict[str, Any]:
        content = {"role": "assistant", "content": found.text}
        words = {"message": content} if self._shape.is_chat else {"text": found.text}
        choice = {"index": index, **words, "logprobs": None, "finish_reason": found.finish_reason}
        return {**choice, **self._details(index, found)}

    def _details(self, index: int, found: Cut) -> dict[str, Any]:
        """The field `dare` of a choice, if it was asked for."""
        completion = self._ticket.completions[index]
        if completion is None or not self._body.dare.details:
            return {}
        part = slice(found.num_tokens)
        details = {
            "prompt_token_ids": list(self._ask.rows[index].prompt),
            "token_ids": completion.tokens[part],
            "step_map": completion.step_map[part],
            "logp": completion.logp[part],
            "nfe": completion.nfe,
            "finish": completion.finish,
        }
        return {"dare": details}

    def _delta(
        self, index: int, text: str, *, is_first: bool = False, finish_reason: str | None = None
    ) -> dict[str, Any]:
        if not self._shape.is_chat:
            return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if is_first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        return event({**self._head(self._shape.chunk), "choices": choices, **(more or {})})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._service.name}

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(len(row.prompt) for row in self._ask.rows[:: self._body.n or 1])
        num_tokens = sum(found.num_tokens for found in self._ended.values())
        total = num_prompt + num_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": total}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event with JSON in it."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
