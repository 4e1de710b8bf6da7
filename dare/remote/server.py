"""A rollout server of our own, which speaks SGLang's or LMDeploy's contract with DARE's engine.

For tests, for machines without those servers, and for a model on another GPU than the trainer's. It draws random
numbers as the trainer's own engine does if the request names them (`Ask.randomness`), so rollouts are the same tokens.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from dare.core.errors import DareError
from dare.core.rng import Key
from dare.remote.host import Completed, Host, Order


class SGLangSampling(BaseModel):
    """`sampling_params`; fields that are not read are ignored, as there."""

    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = -1
    max_new_tokens: int = Field(128, ge=1)
    ignore_eos: bool = False
    sampling_seed: int = 0
    custom_params: dict[str, Any] | None = None


class SGLangGenerate(BaseModel):
    rid: str | None = None
    input_ids: list[int] = Field(min_length=1)
    sampling_params: SGLangSampling = SGLangSampling()
    return_logprob: bool = False
    return_step_maps: bool = False


class SGLangUpdate(BaseModel):
    model_path: str
    weight_version: str | None = None


class LMDeployGenerate(BaseModel):
    input_ids: list[int] = Field(min_length=1)
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    ignore_eos: bool = False
    return_logprob: bool = False
    seed: int = 0
    dare_key: str | None = None
    dare_sample_id: str | None = None


class LMDeployUpdate(BaseModel):
    serialized_named_tensors: str
    load_format: str | None = None
    finished: bool = False


def sglang_app(host: Host, api_key: str | None = None) -> FastAPI:
    """SGLang's `/generate`, `/update_weights_from_disk` and what it says about itself."""
    app = _app(api_key)

    @app.post("/generate")
    def generate(request: SGLangGenerate) -> dict[str, Any]:
        return _sglang_row(host, request)

    @app.get("/get_model_info")
    def model_info() -> dict[str, Any]:
        model_type = host.family.config.get("model_type")
        return {"model_path": host.name, "model_type": model_type, "weight_version": host.version}

    @app.get("/get_server_info")
    def server_info() -> dict[str, Any]:
        return {"dllm_algorithm": host.decode.unmask, "context_length": host.family.spec.max_length}

    @app.post("/update_weights_from_disk")
    def update(request: SGLangUpdate) -> JSONResponse:
        try:
            host.load(Path(request.model_path), request.weight_version or host.version)
        except DareError as error:
            return JSONResponse({"success": False, "message": str(error)}, status_code=400)
        return JSONResponse({"success": True, "message": "loaded", "num_paused_requests": 0})

    return app


def lmdeploy_app(host: Host, api_key: str | None = None) -> FastAPI:
    """LMDeploy's `/generate`, `/v1/models`, `/sleep`, `/wakeup`, with the additions of `dare.remote.lmdeploy`."""
    app = _app(api_key)
    asleep: set[str] = set()
    parts = ("weights", "kv_cache")

    @app.post("/generate")
    def generate(request: LMDeployGenerate) -> Response:
        if asleep:
            return _problem(503, f"asleep: {', '.join(sorted(asleep))}")
        return JSONResponse(_lmdeploy_row(host, request))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        limit = host.family.spec.max_length
        return {"object": "list", "data": [{"id": host.name, "object": "model", "max_model_len": limit}]}

    @app.post("/sleep")
    def sleep(request: Request) -> Response:
        asleep.update(request.query_params.getlist("tags") or parts)
        return Response()

    @app.post("/wakeup")
    def wakeup(request: Request) -> Response:
        asleep.difference_update(request.query_params.getlist("tags") or parts)
        return Response()

    @app.post("/update_weights")
    def update(request: LMDeployUpdate) -> Response:
        if request.load_format != "safetensors":
            return _problem(400, f"load_format {request.load_format}: this server reads safetensors folders only")
        if "kv_cache" not in asleep:
            return _problem(400, "the KV cache is in use; sleep first")
        host.load(Path(request.serialized_named_tensors), host.version)
        return JSONResponse(None)

    return app


APPS: dict[str, Callable[[Host, str | None], FastAPI]] = {"sglang": sglang_app, "lmdeploy": lmdeploy_app}


def _app(api_key: str | None) -> FastAPI:
    """What both have: the key, `/health`, and mistakes as status 400."""

    async def authorize(request: Request) -> None:
        sent = request.headers.get("Authorization", "")
        if api_key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
            raise HTTPException(401, "a wrong API key, or none")

    app = FastAPI(
        title="DARE rollout server", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(authorize)]
    )

    @app.exception_handler(DareError)
    async def mistake(request: Request, error: DareError) -> Response:
        return _problem(400, str(error))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "healthy"}

    return app


def _sglang_row(host: Host, request: SGLangGenerate) -> dict[str, Any]:
    sampling = request.sampling_params
    key, sample_id = _randomness(sampling.custom_params or {}, sampling.sampling_seed)
    order = Order(
        prompt=tuple(request.input_ids),
        num_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=None if sampling.top_k < 1 else sampling.top_k,
        top_p=None if sampling.top_p == 1.0 else sampling.top_p,
        is_eos_ignored=sampling.ignore_eos,
        key=key,
        sample_id=sample_id,
    )
    done = host.complete(order)
    meta = {"id": request.rid, **_meta(order, done), "weight_version": done.version}
    if request.return_logprob:
        meta["output_token_logprobs"] = [[logp, token, None] for logp, token in _pairs(done)]
    if request.return_step_maps:
        meta["step_maps"] = [step + 1 for step in done.steps_in_block]
    return {"text": "", "output_ids": done.tokens, "meta_info": meta}


def _lmdeploy_row(host: Host, request: LMDeployGenerate) -> dict[str, Any]:
    key, sample_id = _randomness(request.model_dump(), request.seed)
    order = Order(
        prompt=tuple(request.input_ids),
        num_tokens=request.max_tokens,
        temperature=request.temperature,
        top_k=request.top_k or None,
        top_p=None if request.top_p == 1.0 else request.top_p,
        is_eos_ignored=request.ignore_eos,
        key=key,
        sample_id=sample_id,
    )
    done = host.complete(order)
    # Its log-probs are those of the logits as they are, which this engine has at temperature 1 only.
    has_logp = request.return_logprob and request.temperature in (0.0, 1.0)
    meta = {
        **_meta(order, done),
        "output_token_logprobs": _pairs(done) if has_logp else None,
        "step_map": [step + 1 for step in done.steps],
    }
    return {"text": "", "output_ids": done.tokens, "meta_info": meta}


def _meta(order: Order, done: Completed) -> dict[str, Any]:
    """What both contracts say about a row."""
    finish = "stop" if done.is_ended and not order.is_eos_ignored else "length"
    num_prompt, num = len(order.prompt), len(done.tokens)
    return {"prompt_tokens": num_prompt, "completion_tokens": num, "finish_reason": {"type": finish}}


def _problem(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=status)


def _randomness(named: dict[str, Any], seed: int) -> tuple[Key, int]:
    """The key and sample id that a request names; else both follow from its seed."""
    try:
        return Key(int(named["dare_key"])), int(named["dare_sample_id"])
    except (KeyError, TypeError, ValueError):
        return Key(seed), 0


def _pairs(done: Completed) -> list[tuple[float, int]]:
    return list(zip(done.logp, done.tokens, strict=True))
