"""A DARE model for OpenCompass, for its command line and for evaluations of a model that is loaded already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from opencompass.models.base import BaseModel, LMTemplateParser
from opencompass.models.base_api import APITemplateParser
from pydantic import ValidationError

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.recipe_errors import explain
from dare.core.rng import stable_id
from dare.core.text import Message, Prompt
from dare.evals.backend import Backend, Continuation, NativeBackend, Stream, continuations, likelihood_stream
from dare.evals.likelihood import Likelihood
from dare.harness.place import load_backend
from dare.harness.text import cut_at

_ROLES = {"HUMAN": "user", "BOT": "assistant", "SYSTEM": "system"}
# The roles of OpenCompass's prompts, kept apart so that the model's own chat template can be applied to them.
_CHAT_META = {
    "round": [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}],
    "reserved_roles": [{"role": "SYSTEM", "api_role": "SYSTEM"}],
}


class DareModel(BaseModel):  # type: ignore[misc]
    """OpenCompass's model interface over the engine and the estimator of the native evaluation.

    path        checkpoint, or the URL of a server
    decode      options of `dare.core.decode.Decode`; without gen_length a data set's max_out_len is the length, with it
                the data set's is ignored
    likelihood  options of `dare.evals.likelihood.Likelihood`
    seed        of sampling and of likelihood masks
    style       chat: prompts become messages; text: their text; auto: chat if the model has a chat template.
                Likelihoods are always those of text
    backend     a loaded model, instead of loading `path`
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        tokenizer_only: bool = False,
        meta_template: dict[str, Any] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        decode: Mapping[str, Any] | None = None,
        likelihood: Mapping[str, Any] | None = None,
        seed: int = 0,
        style: Literal["auto", "chat", "text"] = "auto",
        device: str = "auto",
        dtype: str = "checkpoint",
        base: str | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(path, max_seq_len, tokenizer_only, meta_template, generation_kwargs or {})
        if generation_kwargs:
            raise DareError(
                "a diffusion model has decode options", where="generation_kwargs", fix="put them into decode=dict(...)"
            )
        self.backend = load_backend(path, device, dtype, base) if backend is None else backend
        self._decode, self._seed = dict(decode or {}), seed
        self._decode_for(1)  # a mistake is reported before the first prompt
        try:
            self._likelihood = Likelihood.model_validate(dict(likelihood or {}))
        except ValidationError as error:
            raise explain(error, Likelihood, where="likelihood", what="the options are") from None
        self._plain = LMTemplateParser(None)
        is_chat = (self.backend.default_style() if style == "auto" else style) == "chat"
        self.template_parser = APITemplateParser(meta_template or _CHAT_META) if is_chat else self._plain
        self._seen: Counter[str] = Counter()

    def parse_template(self, prompt_template: Any, mode: str) -> Any:
        """Prompts as text or, for generation by a chat model, as lists of roles and words."""
        parser = self.template_parser if mode == "gen" else self._plain
        return parser.parse_template(prompt_template, mode)

    def generate(self, inputs: list[Any], max_out_len: int, stopping_criteria: Sequence[str] = ()) -> list[str]:
        """A completion per prompt, cut at the first stopping criterion. Equal prompts differ where sampled."""
        prompts = [_prompt(item) for item in inputs]
        ids = []
        for prompt in prompts:
            name = prompt.text if prompt.text is not None else repr(prompt.messages)
            ids.append(stable_id("prompt", name, "copy", self._seen[name]))
            self._seen[name] += 1
        stream = Stream(self._seed, ("generate",))
        completions = self.backend.generate(prompts, self._decode_for(max_out_len), stream, ids)
        return [cut_at(completion.text or "", stopping_criteria) for completion in completions]

    def score_choices(self, documents: Sequence[Sequence[tuple[str, str]]]) -> list[list[float]]:
        """Log-likelihoods in nats of the (context, continuation) pairs of each document; choices share their masks."""
        items: list[Continuation] = [item for document in documents for item in continuations(document)]
        values = iter(self.backend.log_likelihoods(items, self._likelihood, likelihood_stream(self._seed)))
        return [[next(values) for _ in document] for document in documents]

    def get_ppl(self, inputs: list[str], mask_length: list[int] | None = None) -> Any:
        """Always raises DareError: nobody says here which part of the text is the answer.

        An autoregressive model gets away with the whole text, because what the choices share cancels; a Monte-Carlo
        estimate over the whole prompt would be noise about the question.
        """
        raise DareError(
            "a diffusion model needs to know which part of the text to score",
            where="PPLInferencer",
            fix="set the data set's infer_cfg.inferencer.type to ConditionalLikelihoodInferencer of "
            "dare.harness.compass.inferencers, as mmlu_conditional.py of `dare eval configs` does",
        )

    def get_loglikelihood(self, inputs: list[str], conts: list[str]) -> Any:
        """float64 [N], nats: each text's last words `conts` given what stands before them (LLInferencer)."""
        pairs = [(text.removesuffix(cont), cont) for text, cont in zip(inputs, conts, strict=True)]
        return np.array([values[0] for values in self.score_choices([[pair] for pair in pairs])])

    def get_token_len(self, prompt: str) -> int:
        """Tokens of a text; 0 for a remote model, which refuses by itself what is too long."""
        return self.backend.num_tokens(prompt) if isinstance(self.backend, NativeBackend) else 0

    def _decode_for(self, max_out_len: int) -> Decode:
        try:
            return Decode.model_validate({"gen_length": max_out_len, **self._decode})
        except ValidationError as error:
            raise explain(error, Decode, where="decode", what="the decode options are") from None


def _prompt(item: Any) -> Prompt:
    """Text, OpenCompass's roles, or messages."""
    if isinstance(item, str):
        return Prompt("", text=item)
    messages: list[Message] = [
        {"role": part["role"], "content": part["content"]}
        if "content" in part
        else {"role": _ROLES[part["role"]], "content": part["prompt"]}
        for part in item
    ]
    return Prompt("", messages=tuple(messages))
