"""A model that answers: from bodies to jobs, checked against model and limits before anything is queued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.options import Options
from dare.core.recipe_errors import explain
from dare.core.rng import Key, stable_id
from dare.core.text import Prompt
from dare.evals.backend import encode_continuation
from dare.evals.likelihood import Likelihood, Request, check_request
from dare.model import Model, sample_ids_of
from dare.rollout.open_run import RowRequest, lay_out
from dare.rollout.plan import Plan, make_plan
from dare.serve.errors import ApiError, bad_request
from dare.serve.limits import Limits
from dare.serve.metrics import Metrics
from dare.serve.scheduler import RowJob, Scheduler, ScoreJob
from dare.serve.schema import ChatBody, ChatMessage, CompletionBody, Generation, LikelihoodBody, LikelihoodItem
from dare.serve.ticket import Ticket
from dare.serve.transcript import Cut, cut

_Result = TypeVar("_Result")
_OptionsType = TypeVar("_OptionsType", bound=Options)
_MAX_NUMBER = 1e6
_MAX_SCALE = 100.0  # of guidance: beyond, logits are no longer finite numbers of a sensible size


class Ask(NamedTuple):
    """A generation request, understood: its rows in the order of the choices."""

    rows: list[RowRequest]
    plan: Plan
    max_tokens: int | None
    stops: tuple[str, ...]


class Service:
    """The model, its queue and its limits; one per server."""

    def __init__(
        self, model: Model, *, name: str, limits: Limits, num_seats: int, defaults: dict[str, Any] | None = None
    ) -> None:
        """`defaults` are decode options that requests start from. Raises DareError if they do not fit the model."""
        self.model, self.name, self.limits = model, name, limits
        self.created = int(time.time())
        self.metrics = Metrics()
        self._defaults, self._num_seats = dict(defaults or {}), num_seats
        spec = model.family.spec
        self._width = min(spec.max_length, limits.max_prompt_tokens + limits.max_tokens + spec.block_length)
        self.scheduler = Scheduler(
            model.family, self.metrics, num_seats=num_seats, width=self._width, max_queue=limits.max_queue
        )
        # Tokenizers are not safe to share between threads: this one does all the reading and writing of text.
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="dare-text")
        decode = read_decode(self._defaults)
        make_plan(model.family, decode)
        most = min(limits.max_tokens, self._width - 1)
        if decode.gen_length > most:
            raise DareError(
                "completions are longer by default than they may be",
                where="decode.gen_length",
                got=decode.gen_length,
                expected=f"<= {most}",
                fix=f"give gen_length={most} or less, or a higher --limit max_tokens",
            )

    async def text(self, work: Callable[[], _Result]) -> _Result:
        """Do something with the tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work)

    def close(self) -> None:
        """Stop the engine and give threads back."""
        self.scheduler.stop()
        self._text_thread.shutdown(cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless the request is for the model that is served."""
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model '{name}' here, only '{self.name}'", param="model", code="model_not_found"
            )

    async def ask_completion(self, body: CompletionBody) -> Ask:
        """Raises ApiError for what does not fit."""
        prompts: list[Any]
        if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
            prompts = [body.prompt]
        else:
            prompts = list(body.prompt) or [[]]
        return await self._ask(body, prompts, body.max_tokens, param="prompt")

    async def ask_chat(self, body: ChatBody) -> Ask:
        """Raises ApiError for what does not fit."""
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        messages = [message.plain for message in body.messages]
        return await self._ask(body, [messages], body.max_completion_tokens or body.max_tokens, param="messages")

    def row_jobs(self, ask: Ask, ticket: Ticket, *, has_canvas: bool) -> list[RowJob]:
        """Jobs for the scheduler, one a row."""
        return [RowJob(ticket, index, row, ask.plan, has_canvas=has_canvas) for index, row in enumerate(ask.rows)]

    async def score_job(self, body: LikelihoodBody, ticket: Ticket) -> ScoreJob:
        """The job of a likelihood request. Raises ApiError for what does not fit."""
        self.check_model(body.model)
        limits = self.limits
        if len(body.items) > limits.max_items:
            raise ApiError(400, f"{len(body.items)} items, at most {limits.max_items} are allowed", param="items")
        _check_numbers(body.likelihood, "likelihood")
        options = _validated(Likelihood, body.likelihood, "likelihood")
        if options.num_samples > limits.max_samples:
            raise ApiError(400, f"at most {limits.max_samples} samples are allowed", param="likelihood.num_samples")
        if options.cfg_scale > _MAX_SCALE:
            raise ApiError(400, f"at most {_MAX_SCALE} is allowed", param="likelihood.cfg_scale")
        requests = await self.text(lambda: [self._score_request(i, item) for i, item in enumerate(body.items)])
        for index, request in enumerate(requests):
            try:
                check_request(self.model.family, request, options)
            except DareError as error:
                raise bad_request(error, f"items.{index}") from None
        self.metrics.prompt_tokens.inc(sum(len(request.context) for request in requests))
        options = options.model_copy(update={"batch_size": min(options.batch_size, self._num_seats)})
        return ScoreJob(ticket, requests, options, Key(body.seed or 0).fold(*body.key))

    def cut(self, ask: Ask, tokens: Sequence[int]) -> Cut:
        """What the client gets of a row's tokens."""
        spec, tokenizer = self.model.family.spec, self.model.tokenizer
        return cut(tokenizer, tokens, eos_ids=spec.eos_ids, stops=ask.stops, max_tokens=ask.max_tokens)

    async def _ask(self, body: Generation, prompts: list[Any], max_tokens: int | None, *, param: str) -> Ask:
        self.check_model(body.model)
        limits, num_copies = self.limits, body.n or 1
        if len(prompts) * num_copies > limits.max_choices:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n {num_copies} are more than {limits.max_choices} choices",
                param="n" if num_copies > 1 else param,
            )
        if body.stops and self.model.tokenizer is None:
            raise ApiError(400, "this checkpoint has no tokenizer, so there is no text to stop at", param="stop")
        decode = self._decode(body, max_tokens)
        plan = self._plan(decode)
        ids = [ids for ids in await self.text(lambda: self._encode(prompts, param)) for _ in range(num_copies)]
        sample_ids = body.dare.sample_ids or sample_ids_of(ids)
        if len(sample_ids) != len(ids):
            raise ApiError(400, f"{len(sample_ids)} ids for {len(ids)} choices", param="dare.sample_ids")
        key = Key(body.seed or 0).fold(*body.dare.key)
        rows = [RowRequest(tuple(i), decode.gen_length, key, id_) for i, id_ in zip(ids, sample_ids, strict=True)]
        for row in rows[::num_copies]:
            try:
                lay_out(self.model.family, plan, row, self._width)
            except DareError as error:
                raise bad_request(error, param) from None
        self.metrics.prompt_tokens.inc(sum(map(len, ids)))
        return Ask(rows, plan, max_tokens, body.stops)

    def _decode(self, body: Generation, max_tokens: int | None) -> Decode:
        """The server's options, then `dare.decode`, then the fields of the OpenAI API."""
        spec, limits, given = self.model.family.spec, self.limits, body.dare.decode
        options: dict[str, Any] = {**self._defaults, **given}
        for name, value in (("temperature", body.temperature), ("top_p", body.top_p)):
            if value is not None and given.get(name, value) != value:
                raise ApiError(400, f"{name} and dare.decode.{name} differ", param=name)
            options |= {} if value is None else {name: value}
        if max_tokens is not None and "gen_length" not in given:
            length = options.get("block_length") or spec.block_length
            is_grid = spec.block_grid == "completion" and isinstance(length, int)
            options["gen_length"] = max_tokens + (-max_tokens % length if is_grid else 0)
        _check_numbers(given, "dare.decode")
        decode = _validated(Decode, options, "dare.decode")
        if "gen_length" in given or max_tokens is None:
            asked, param = decode.gen_length, "dare.decode.gen_length"
        else:
            asked, param = max_tokens, "max_tokens"
        for name, value, most in (
            (param, asked, limits.max_tokens),
            ("dare.decode.block_length", decode.block_length or 1, self._width),
            ("dare.decode.cfg_scale", decode.cfg_scale, _MAX_SCALE),
            ("dare.decode.temperature", decode.temperature, _MAX_SCALE),
            ("dare.decode.max_post_steps", decode.max_post_steps or 0, limits.max_steps),
        ):
            if value > most:
                raise ApiError(400, f"{name} {value} is more than {most}", param=name, code="limit")
        return decode

    def _plan(self, decode: Decode) -> Plan:
        """The plan that rows of all lengths share."""
        family, limits = self.model.family, self.limits
        try:
            plan = make_plan(family, decode)
        except DareError as error:
            raise bad_request(error, "dare.decode") from None
        if plan.min_total_steps > limits.max_steps:
            raise ApiError(
                400, f"{plan.min_total_steps} denoising steps are more than {limits.max_steps}",
                param="dare.decode.steps_per_block", code="limit",
            )  # fmt: skip
        num_blocks = 8 if plan.is_packed else 1
        shared = {"gen_length": num_blocks * plan.block_length, "batch_size": 1}
        return make_plan(family, decode.model_copy(update=shared))

    def _encode(self, prompts: Sequence[Any], param: str) -> list[list[int]]:
        try:
            ids = [self.model.encode(prompt) for prompt in prompts]
        except DareError as error:
            raise bad_request(error, param) from None
        longest = max(map(len, ids))
        if longest > self.limits.max_prompt_tokens:
            raise ApiError(
                400, f"the prompt has {longest} tokens, at most {self.limits.max_prompt_tokens} are allowed",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return ids

    def _score_request(self, index: int, item: LikelihoodItem) -> Request:
        """Token ids of an item; text is split where the native evaluation splits it."""
        context, continuation = item.context, item.continuation
        try:
            if isinstance(context, str) and isinstance(continuation, str):
                tokenizer = self.model.require_tokenizer()
                context_ids, ids = encode_continuation(tokenizer, Prompt(uid="", text=context), continuation)
            else:
                context_ids, ids = self.model.encode(_plain(context)), self.model.encode(continuation)
        except DareError as error:
            raise bad_request(error, f"items.{index}") from None
        if len(context_ids) + len(ids) > self.limits.max_prompt_tokens:
            raise ApiError(
                400, f"more than {self.limits.max_prompt_tokens} tokens", param=f"items.{index}",
                code="context_length_exceeded",
            )  # fmt: skip
        sample_id = item.sample_id
        if sample_id is None:
            sample_id = stable_id("likelihood", *context_ids, "->", *ids)
        return Request(context_ids, ids, sample_id)


def read_decode(options: dict[str, Any]) -> Decode:
    """The decode options that a server starts from. Raises DareError naming what is wrong."""
    try:
        return Decode.model_validate(options)
    except ValidationError as error:
        raise explain(error, Decode, where="serve", what="the decode options are") from None


def _plain(context: str | list[int] | list[ChatMessage]) -> str | list[Any]:
    """Text, token ids or messages as `Model.encode` takes them."""
    if isinstance(context, str):
        return context
    return [part.plain if isinstance(part, ChatMessage) else part for part in context]


def _validated(model: type[_OptionsType], options: dict[str, Any], param: str) -> _OptionsType:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        location = error.errors()[0]["loc"]
        field = ".".join([param, *(str(part) for part in location)])
        raise bad_request(explain(error, model, where=param, what=f"{param} is"), field) from None


def _check_numbers(options: dict[str, Any], param: str) -> None:
    """No option needs a number beyond these, and some do not stand it."""
    for name, value in options.items():
        if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            raise ApiError(400, f"{name} is out of range", param=f"{param}.{name}", code="invalid_value")
