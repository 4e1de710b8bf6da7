"""Answers and chunks of a stream, in the shapes of the OpenAI API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from dare.core.text import Completion
from dare.families.tokenizer import token_piece
from dare.serve.errors import ApiError
from dare.serve.schema import Generation
from dare.serve.service import Ask, Service
from dare.serve.ticket import CanvasNow, Ticket
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
    """The answer to one request, whole or in chunks."""

    def __init__(self, service: Service, body: Generation, ask: Ask, ticket: Ticket, shape: Shape) -> None:
        self._service, self._body, self._ask, self._ticket, self._shape = service, body, ask, ticket, shape
        self.id = f"{shape.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The answer, when all rows have ended."""
        await self._ticket.done()
        completions = [completion for completion in self._ticket.completions if completion is not None]
        cuts = await self._service.text(lambda: [self._service.cut(self._ask, item.tokens) for item in completions])
        choices = [self._choice(index, *pair) for index, pair in enumerate(zip(completions, cuts, strict=True))]
        usage = self._usage(sum(item.num_tokens for item in cuts))
        return {**self._head(self._shape.whole), "choices": choices, "usage": usage}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Server-sent events: pieces of text as blocks are complete, canvases if asked for, then [DONE]."""
        num_rows, ticket = len(self._ask.rows), self._ticket
        transcripts = [Transcript(self._ask.stops) for _ in range(num_rows)]
        ended: dict[int, int] = {}  # tokens of the rows that have ended
        canvases: list[CanvasNow | None] = [None] * num_rows
        if self._shape.is_chat:
            for index in range(num_rows):
                yield self._chunk([self._delta(index, "", is_first=True)])
        try:
            while len(ended) < num_rows:
                await ticket.news()
                for index in range(num_rows):
                    canvas, completion = ticket.canvases[index], ticket.completions[index]
                    if canvas is not None and canvas is not canvases[index]:
                        canvases[index] = canvas
                        yield await self._canvas_chunk(index, canvas)
                    if index not in ended:
                        for chunk in await self._grow(index, completion, transcripts[index], ended):
                            yield chunk
        except ApiError as error:
            yield event(error.body)
            return
        if self._body.has_usage_chunk:
            yield self._chunk([], {"usage": self._usage(sum(ended.values()))})
        yield _DONE

    async def _grow(
        self, index: int, completion: Completion | None, transcript: Transcript, ended: dict[int, int]
    ) -> list[bytes]:
        """The chunks with what is new in a row, and its end."""
        tokens = self._ticket.settled[index] if completion is None else completion.tokens
        found = await self._service.text(lambda: self._service.cut(self._ask, tokens))
        is_final = completion is not None or (found.is_final and not self._body.dare.details)
        piece = transcript.grow(found.text, is_final=is_final)
        chunks = [self._chunk([self._delta(index, piece)])] if piece else []
        if is_final:
            ended[index] = found.num_tokens
            last = self._delta(index, "", finish_reason=found.finish_reason)
            if completion is not None and self._body.dare.details:
                last["dare"] = self._details(index, completion, found)
            chunks.append(self._chunk([last]))
        return chunks

    async def _canvas_chunk(self, index: int, canvas: CanvasNow) -> bytes:
        mask_id, tokenizer = self._service.model.family.spec.mask_id, self._service.model.tokenizer
        ids = [None if token == mask_id else token for token in canvas.tokens]
        pieces = await self._service.text(
            lambda: [None if token is None else token_piece(tokenizer, token) for token in ids]
        )
        shown = {"index": index, "step": canvas.step, "token_ids": ids, "pieces": pieces}
        return self._chunk([], {"dare": {"canvas": shown}})

    def _choice(self, index: int, completion: Completion, found: Cut) -> dict[str, Any]:
        content = {"role": "assistant", "content": found.text}
        words = {"message": content} if self._shape.is_chat else {"text": found.text}
        choice = {"index": index, **words, "logprobs": None, "finish_reason": found.finish_reason}
        return {**choice, "dare": self._details(index, completion, found)} if self._body.dare.details else choice

    def _details(self, index: int, completion: Completion, found: Cut) -> dict[str, Any]:
        part = slice(found.num_tokens)
        return {
            "prompt_token_ids": list(self._ask.rows[index].prompt),
            "token_ids": completion.tokens[part],
            "step_map": completion.step_map[part],
            "logp": completion.logp[part],
            "nfe": completion.nfe,
            "finish": completion.finish,
        }

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

    def _usage(self, num_tokens: int) -> dict[str, int]:
        num_prompt = sum(len(row.prompt) for row in self._ask.rows[:: self._body.n or 1])
        total = num_prompt + num_tokens
        return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": total}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event with JSON in it."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
