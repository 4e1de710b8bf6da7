"""The contract of SGLang's native HTTP server with a dLLM algorithm.

`/generate`, `/model_info`, `/server_info` and `/update_weights_from_disk` are those of its documentation. Step
maps are `meta_info.step_maps`, asked for by `return_step_maps` (sgl-project/sglang #17297 and #27943, not merged):
1-based within each block, one per returned token. A server without them still trains what needs no step map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from dare.remote.contract import (
    Answer,
    Ask,
    BadAnswer,
    Call,
    Facts,
    Message,
    Numbering,
    check_length,
    checked_logp,
    read,
)

_TOP_K_ALL = -1


class _Finish(Message):
    type: str
    message: str | None = None


class _Meta(Message):
    id: str | None = None
    prompt_tokens: int
    finish_reason: _Finish | None = None
    output_token_logprobs: list[tuple[float, int] | tuple[float, int, str | None]] | None = None
    step_maps: list[int] | None = None
    weight_version: str | None = None


class _Generated(Message):
    output_ids: list[int]
    meta_info: _Meta


class _ModelInfo(Message):
    model_path: str | None = None
    model_type: str | None = None
    weight_version: str | None = None


class _ServerInfo(Message):
    context_length: int | None = None
    dllm_algorithm: str | None = Field("", description="null: started without one; absent: it does not say")


class _Updated(Message):
    success: bool
    message: str = ""


class SGLang:
    """See `dare.remote.contract.Contract`."""

    name = "sglang"
    numbering: Numbering = "block"

    def generate(self, ask: Ask, attempt: int) -> Call:
        sampling: dict[str, Any] = {
            "temperature": ask.temperature,
            "top_p": 1.0 if ask.top_p is None else ask.top_p,
            "top_k": _TOP_K_ALL if ask.top_k is None else ask.top_k,
            "max_new_tokens": ask.num_tokens,
            "ignore_eos": ask.is_eos_ignored,
            "skip_special_tokens": False,
            "sampling_seed": ask.seed,
            "custom_params": ask.randomness,
        }
        body = {
            "rid": ask.name(attempt),
            "input_ids": list(ask.prompt),
            "sampling_params": sampling,
            "return_logprob": ask.has_logp,
            "return_step_maps": True,
            "stream": False,
        }
        return Call("POST", "/generate", body)

    def answer(self, body: bytes, ask: Ask, attempt: int) -> Answer:
        generated = read(_Generated, body)
        meta, tokens = generated.meta_info, generated.output_ids
        if meta.id is not None and meta.id != ask.name(attempt):
            raise BadAnswer(f"the answer to another request: id {meta.id}, sent {ask.name(attempt)}")
        if meta.finish_reason is not None and meta.finish_reason.type == "abort":
            raise BadAnswer(f"the request was aborted: {meta.finish_reason.message or 'no reason given'}")
        check_length(len(tokens), ask, meta.prompt_tokens)
        entries = meta.output_token_logprobs or None  # empty where the dLLM path computes none
        pairs = None if entries is None else [(entry[0], entry[1]) for entry in entries]
        return Answer(tokens, meta.step_maps, checked_logp(pairs, tokens), meta.weight_version)

    def logp_temperature(self, temperature: float) -> float:
        return temperature or 1.0

    def inquiries(self) -> list[Call]:
        """The same two under their old and their new names, of which a version may have one."""
        paths = ("/get_model_info", "/model_info", "/get_server_info", "/server_info")
        return [Call("GET", path, is_optional=True) for path in paths]

    def facts(self, bodies: Sequence[bytes]) -> Facts:
        models = [read(_ModelInfo, body) for body in bodies[:2]]
        servers = [read(_ServerInfo, body) for body in bodies[2:]]
        model = next((found for found in models if found != _ModelInfo()), _ModelInfo())
        server = next((found for found in servers if found != _ServerInfo()), _ServerInfo())
        if server.dllm_algorithm is None:
            raise BadAnswer("it was started without --dllm-algorithm, so it decodes from left to right")
        return Facts(model.model_path, model.model_type, server.context_length, model.weight_version)

    def update(self, folder: Path, version: str) -> list[Call]:
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True, "abort_all_requests": False}
        return [Call("POST", "/update_weights_from_disk", body)]

    def check_update(self, call: Call, body: bytes) -> None:
        updated = read(_Updated, body)
        if not updated.success:
            raise BadAnswer(f"it did not load the weights: {updated.message}")
