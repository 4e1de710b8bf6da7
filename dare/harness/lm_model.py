"""A DARE model for lm-eval: `lm_eval.simple_evaluate(model=DareLM(model))`, or `dare-lm-eval --model dare`.

The engine and the estimator are those of the native evaluation, so the same rows give the same answers, and lm-eval's
batch size changes no result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from pydantic import ValidationError

from dare.api import evaluation_backend
from dare.core.decode import Decode
from dare.core.errors import DareError, unknown_name
from dare.core.recipe_errors import explain
from dare.core.rng import stable_id
from dare.core.text import Prompt
from dare.evals.backend import Backend, Continuation, NativeBackend, Stream, continuations, likelihood_stream
from dare.evals.likelihood import Likelihood
from dare.harness.place import load_backend
from dare.harness.text import cut_at
from dare.model import Model

_REQUEST_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
_PLACE = ("pretrained", "path", "base", "device", "dtype", "seed")
_LIKELIHOOD = "likelihood."


@register_model("dare")
class DareLM(LM):  # type: ignore[misc]
    """lm-eval's three requests, answered by DARE.

    model       a loaded model, or any back end
    decode      options of `dare.core.decode.Decode`. They win over what a task asks for (max_gen_toks, temperature);
                `get_model_info` puts them into lm-eval's results
    likelihood  options of `dare.evals.likelihood.Likelihood`
    seed        of sampling and of likelihood masks; lm-eval's own seeds choose examples and nothing here
    """

    def __init__(
        self,
        model: Model | Backend,
        *,
        decode: Mapping[str, Any] | None = None,
        likelihood: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backend: Backend = evaluation_backend(model) if isinstance(model, Model) else model
        self._decode, self._seed = dict(decode or {}), seed
        self._decode_for({})  # a mistake is reported before the first request
        try:
            self._likelihood = Likelihood.model_validate(likelihood or {})
        except ValidationError as error:
            raise explain(error, Likelihood, where="likelihood", what="the options are") from None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DareLM:
        """From `--model_args pretrained=CHECKPOINT,gen_length=128,likelihood.num_samples=32`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DareLM:
        """From the same as a mapping. `additional_config` is lm-eval's batch_size and device.

        Raises DareError for an unknown argument and for a checkpoint that is none.
        """
        harness = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # lm-eval names "cuda:0" by itself, with or without one.
        arguments = {"device": "cpu" if harness.get("device") == "cpu" else "auto", **arg_dict}
        place = {name: arguments.pop(name) for name in _PLACE if name in arguments}
        checkpoint = place.get("pretrained", place.get("path"))
        if checkpoint is None:
            raise DareError("there is no checkpoint", where="--model_args", expected="pretrained=CHECKPOINT")
        likelihood = {
            name.removeprefix(_LIKELIHOOD): value for name, value in arguments.items() if name.startswith(_LIKELIHOOD)
        }
        decode = {name: value for name, value in arguments.items() if not name.startswith(_LIKELIHOOD)}
        batch_size = str(harness.get("batch_size", "auto"))
        if batch_size.isdigit():
            decode.setdefault("batch_size", int(batch_size))
            likelihood.setdefault("batch_size", int(batch_size))
        backend = load_backend(
            str(checkpoint), str(place["device"]), str(place.get("dtype", "checkpoint")), place.get("base")
        )
        return cls(backend, decode=decode, likelihood=likelihood, seed=int(place.get("seed", 0)))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, cut at the first of the request's stop strings.

        Raises DareError for a request option that a diffusion model does not have.
        """
        by_decode: dict[str, list[int]] = defaultdict(list)
        decodes: dict[str, Decode] = {}
        seen: Counter[str] = Counter()
        ids = []
        for index, request in enumerate(requests):
            context, options = request.args
            decode = self._decode_for(options)
            name = decode.model_dump_json()
            decodes[name] = decode
            by_decode[name].append(index)
            ids.append(stable_id("prompt", context, "copy", seen[context]))  # repeats of a request differ if sampled
            seen[context] += 1
        texts = [""] * len(requests)
        for name, indices in by_decode.items():
            prompts = [Prompt(f"request {index}", text=requests[index].args[0]) for index in indices]
            stream = Stream(self._seed, ("generate",))
            completions = self.backend.generate(prompts, decodes[name], stream, [ids[index] for index in indices])
            for index, completion in zip(indices, completions, strict=True):
                texts[index] = cut_at(completion.text or "", requests[index].args[1].get("until") or ())
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding of that many positions gives the continuation).

        The second is computed where a document has one request (LAMBADA, say), and is False where it has several:
        for multiple choice nobody asks, and it would cost as many forwards as there are tokens.
        """
        documents: dict[tuple[str | None, int | None], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            documents[request.task_name, request.doc_id].append(index)
        items: list[Continuation] = []
        order: list[int] = []
        for indices in documents.values():
            items += continuations([requests[index].args[:2] for index in indices])
            order += indices
        values = self.backend.log_likelihoods(items, self._likelihood, likelihood_stream(self._seed))
        alone = [place for place, index in enumerate(order) if len(documents[_document(requests[index])]) == 1]
        is_greedy = dict(zip(alone, self._is_greedy([items[place] for place in alone]), strict=True))
        answers = [(0.0, False)] * len(requests)
        for place, (index, value) in enumerate(zip(order, values, strict=True)):
            answers[index] = (value, is_greedy.get(place, False))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """A lower bound of each text's log-likelihood, nats: the ELBO of windows without context, summed.

        So a perplexity is an upper bound and no number to put beside that of an autoregressive model.
        Raises DareError for a remote model, whose window is not known here.
        """
        if not isinstance(self.backend, NativeBackend):
            raise DareError(
                "the likelihood of whole documents needs the model in this process", fix="give a checkpoint, not a URL"
            )
        texts = [request.args[0] for request in requests]
        return self.backend.text_log_likelihoods(texts, self._likelihood, likelihood_stream(self._seed))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the checkpoint's own template; without `add_generation_prompt` the last
        message stays open. Raises DareError for a checkpoint without one."""
        if not isinstance(self.backend, NativeBackend):
            raise DareError("chat templates need the model's tokenizer here", fix="give a checkpoint, not a URL")
        return self.backend.render(chat_history, is_open=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself, which lm-eval records; "" if none is applied.

        Raises DareError for the name of another template: a model is evaluated with its own.
        """
        if chat_template is False:
            return ""
        if chat_template is not True:
            raise DareError("a model has one chat template, its own", where="--apply_chat_template", got=chat_template)
        template = self.backend.tokenizer.chat_template if isinstance(self.backend, NativeBackend) else None
        return str(template or "")

    @property
    def tokenizer_name(self) -> str:
        """What tells apart lm-eval's caches of rendered requests: a hash of tokenizer and template."""
        facts = self.backend.describe()
        return f"{facts.get('tokenizer_sha256')}-{facts.get('chat_template_sha256')}".replace("/", "_")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its scores: the model's identity and every setting of ours."""
        return {
            "dare_model": self.backend.describe(),
            "dare_decode": self._decode,
            "dare_likelihood": self._likelihood.model_dump(mode="json"),
            "dare_seed": self._seed,
        }

    def _decode_for(self, options: Mapping[str, Any]) -> Decode:
        """Decode options of a request: what it asks for, except where this model's own settings say otherwise."""
        for name in options:
            if name not in _REQUEST_OPTIONS:
                raise unknown_name("generation option", name, _REQUEST_OPTIONS, where="generation_kwargs")
        wanted: dict[str, Any] = {}
        if "max_gen_toks" in options:
            wanted["gen_length"] = int(options["max_gen_toks"])
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample", temperature > 0.0) and temperature > 0.0:
            wanted["temperature"] = temperature
            wanted |= {name: options[name] for name in ("top_p", "top_k") if options.get(name)}
        try:
            return Decode.model_validate({**wanted, **self._decode})
        except ValidationError as error:
            raise explain(error, Decode, where="generation", what="the decode options are") from None

    def _is_greedy(self, items: Sequence[Continuation]) -> list[bool]:
        """Whether greedy denoising of as many positions as the continuation has tokens gives exactly its text."""
        if not items:
            return []
        if not isinstance(self.backend, NativeBackend):
            raise DareError("greedy continuations need the model in this process", fix="give a checkpoint, not a URL")
        return self.backend.are_greedy(items)


def _document(request: Instance) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id
