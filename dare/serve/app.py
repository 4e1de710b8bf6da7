"""The routes. Handlers wait for the engine in turns with the client's leaving and the request's time limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dare.serve import metrics, schema
from dare.serve.answers import CHAT, COMPLETION, Answer, Shape, event
from dare.serve.errors import CLIENT_LEFT, ApiError, ErrorBody, invalid_body, plain_error
from dare.serve.guard import Receive, Scope, Send
from dare.serve.scheduler import Job
from dare.serve.schema import ChatBody, CompletionBody, Generation, LikelihoodBody, LikelihoodItem
from dare.serve.service import Ask, Service
from dare.serve.ticket import Ticket

_Result = TypeVar("_Result")
_BODIES: list[type[BaseModel]] = [
    CompletionBody, ChatBody, LikelihoodBody, LikelihoodItem, schema.DareFields, schema.ChatMessage, schema.TextPart,
    schema.StreamOptions,
]  # fmt: skip
_FIELDS = sorted({name for body in _BODIES for name in body.model_fields})
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 504)
}
_UNFORESEEN = ApiError(500, "the server has a fault of its own", code="internal_error")
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def make_app(service: Service) -> FastAPI:
    """The application for a service, without its guard."""
    app = _App(title="dare serve", version="1", docs_url=None, redoc_url=None, responses=_ERRORS)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    _add_generation(app, service)
    _add_likelihood(app, service)
    _add_facts(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses={200: {"model": schema.CompletionAnswer, **_STREAM}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Complete prompts; with `stream`, server-sent events."""
        ask = await service.ask_completion(body)
        return await _generate(service, body, ask, COMPLETION, request)

    @app.post("/v1/chat/completions", responses={200: {"model": schema.ChatAnswer, **_STREAM}})
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation; with `stream`, server-sent events."""
        ask = await service.ask_chat(body)
        return await _generate(service, body, ask, CHAT, request)


def _add_likelihood(app: FastAPI, service: Service) -> None:
    @app.post("/v1/loglikelihood", responses={200: {"model": schema.LikelihoodAnswer}})
    async def loglikelihood(body: LikelihoodBody, request: Request) -> Response:
        """Monte-Carlo log-likelihood of each continuation given its context, nats: a lower bound."""
        ticket = Ticket(1)
        job = await service.score_job(body, ticket)
        service.scheduler.submit([job])
        await _attended(service, [job], request.receive, ticket.done())
        values = [
            {"index": index, "log_likelihood": value, "num_tokens": len(scored.completion)}
            for index, (value, scored) in enumerate(zip(ticket.values or [], job.requests, strict=True))
        ]
        return JSONResponse({"object": "dare.loglikelihood", "model": service.name, "data": values})


def _add_facts(app: FastAPI, service: Service) -> None:
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "dare"}

    @app.get("/v1/models", responses={200: {"model": schema.ModelList}})
    async def models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/health", responses={200: {"model": schema.Health}, 503: {"model": schema.Health}})
    async def health() -> Response:
        """Whether requests are taken."""
        status = service.scheduler.status
        return JSONResponse({"status": status, "model": service.name}, 200 if status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def prometheus() -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


async def _generate(service: Service, body: Generation, ask: Ask, shape: Shape, request: Request) -> Response:
    ticket = Ticket(len(ask.rows))
    is_stream, wants = bool(body.stream), body.dare
    if wants.canvas and not is_stream:
        raise ApiError(400, "canvas updates need stream: true", param="dare.canvas")
    jobs = service.row_jobs(ask, ticket, has_canvas=wants.canvas)
    answer = Answer(service, body, ask, jobs, shape)
    service.scheduler.submit(jobs)
    if is_stream:
        return EventStream(service, jobs, answer.chunks())
    return JSONResponse(await _attended(service, jobs, request.receive, answer.whole()))


class EventStream(StreamingResponse):
    """Server-sent events, until they end, the client leaves or time is up."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, jobs: Sequence[Job], chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, headers={"Cache-Control": "no-store"})
        self._service, self._jobs = service, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _attended(self._service, self._jobs, receive, self.stream_response(send))
        except ApiError as error:
            if error.code != CLIENT_LEFT:
                await send({"type": "http.response.body", "body": event(error.body), "more_body": False})


async def _attended(
    service: Service, jobs: Sequence[Job], receive: Receive, result: Coroutine[Any, Any, _Result]
) -> _Result:
    """The result, unless the client leaves or time is up before: then nobody works on it any longer."""
    work, gone = asyncio.create_task(result), asyncio.create_task(_until_gone(receive))
    limit = service.limits.timeout_s
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            return work.result()
        if gone in done:
            raise ApiError(400, "the client left", code=CLIENT_LEFT)
        raise ApiError(504, f"the request took more than {limit:g} seconds", code="timeout")
    finally:
        service.scheduler.give_up(jobs)
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The schema, without the framework's own kind of validation error, which nobody gets."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document


def _api_error(request: Request, error: Exception) -> Response:
    return (error if isinstance(error, ApiError) else _UNFORESEEN).response()


def _invalid(request: Request, error: Exception) -> Response:
    return (invalid_body(error, _FIELDS) if isinstance(error, RequestValidationError) else _UNFORESEEN).response()


def _http_error(request: Request, error: Exception) -> Response:
    return (plain_error(error) if isinstance(error, HTTPException) else _UNFORESEEN).response()


def _unforeseen(request: Request, error: Exception) -> Response:
    return _UNFORESEEN.response()
