"""The contract of LMDeploy's api_server with its PyTorch engine.

`/generate`, `/v1/models`, `/sleep` and `/wakeup` are those of its documentation. Two things are ours, because nothing
published does them over HTTP: `meta_info.step_map` (the values of InternLM/lmdeploy #4057, 1-based, going on from block
to block; its pipeline returns them, its server does not), and `/update_weights` with `load_format: safetensors`, which
names a folder. The published call carries pickled GPU handles, which DARE neither writes nor reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

_TOP_K_ALL = 0


class _Finish(Message):
    type: str


class _Meta(Message):
    prompt_tokens: int
    finish_reason: _Finish | None = None
    output_token_logprobs: list[tuple[float, int]] | None = None
    step_map: list[int] | None = None


class _Generated(Message):
    output_ids: list[int]
    meta_info: _Meta


class _Model(Message):
    id: str
    max_model_len: int | None = None


class _Models(Message):
    data: list[_Model]


class LMDeploy:
    """See `dare.remote.contract.Contract`."""

    name = "lmdeploy"
    numbering: Numbering = "row"

    def generate(self, ask: Ask, attempt: int) -> Call:
        body = {
            "input_ids": list(ask.prompt),
            "max_tokens": ask.num_tokens,
            "temperature": ask.temperature,
            "top_p": 1.0 if ask.top_p is None else ask.top_p,
            "top_k": _TOP_K_ALL if ask.top_k is None else ask.top_k,
            "ignore_eos": ask.is_eos_ignored,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "return_logprob": ask.has_logp,
            "stream": False,
            "seed": ask.seed,
            **ask.randomness,
        }
        return Call("POST", "/generate", body)

    def answer(self, body: bytes, ask: Ask, attempt: int) -> Answer:
        generated = read(_Generated, body)
        meta, tokens = generated.meta_info, generated.output_ids
        if meta.finish_reason is not None and meta.finish_reason.type in ("abort", "error"):
            raise BadAnswer(f"the request ended with {meta.finish_reason.type}")
        check_length(len(tokens), ask, meta.prompt_tokens)
        return Answer(tokens, meta.step_map, checked_logp(meta.output_token_logprobs or None, tokens), None)

    def logp_temperature(self, temperature: float) -> float:
        """Its log-probs are those of the logits as they are (logprobs_mode: raw_logprobs)."""
        return 1.0

    def inquiries(self) -> list[Call]:
        return [Call("GET", "/v1/models")]

    def facts(self, bodies: Sequence[bytes]) -> Facts:
        models = read(_Models, bodies[0]).data
        if not models:
            raise BadAnswer("it serves no model")
        return Facts(model=models[0].id, max_length=models[0].max_model_len)

    def update(self, folder: Path, version: str) -> list[Call]:
        asleep = (("tags", "weights"), ("tags", "kv_cache"), ("level", "2"))
        weights = {"serialized_named_tensors": str(folder), "load_format": "safetensors", "finished": True}
        return [
            Call("POST", "/sleep", {}, asleep),
            Call("POST", "/wakeup", {}, (("tags", "weights"),)),
            Call("POST", "/update_weights", weights),
            Call("POST", "/wakeup", {}, (("tags", "kv_cache"),)),
        ]

    def check_update(self, call: Call, body: bytes) -> None:
        """Its answers are empty: the status says all."""
