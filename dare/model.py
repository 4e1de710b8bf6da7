"""The Python API: load a checkpoint, look at logits, generate, measure likelihoods, save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dare.core.decode import Decode
from dare.core.errors import DareError, unknown_name
from dare.core.files import whole_directory
from dare.core.recipe_errors import explain
from dare.core.rng import Key, stable_id
from dare.core.text import Completion, Message, Prompt
from dare.diffusion.trace import to_completions
from dare.evals.likelihood import log_likelihood
from dare.families.base import Family
from dare.families.checkpoint import load_checkpoint
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_completion, encode_prompt, load_tokenizer, token_piece
from dare.families.weights import resolve_checkpoint, save_family
from dare.rollout.engine import denoise
from dare.rollout.trace_file import NUM_ALTERNATIVES, save_trace
from dare.training.checkpoint import resolve_model_path

PromptLike = str | Sequence[int] | Sequence[Message]


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    base: str | Path | None = None,
) -> Model:
    """A model from a checkpoint folder, a run folder (its newest checkpoint) or a hub id.

    An adapter is loaded on top of the base model that it names, or of `base`, after a check that the base's weights
    are those it was trained on.
    dtype  torch's, or its name; None keeps the checkpoint's own. A folder without a tokenizer works with token ids.
    Raises DareError for anything that is not a whole checkpoint of a known family.
    """
    folder = resolve_checkpoint(resolve_model_path(str(path)))
    base_path = None if base is None else resolve_model_path(str(base))
    family = load_checkpoint(folder, find_dtype(dtype), torch.device(device), base=base_path)
    family.network.eval()
    return Model(family, load_tokenizer(folder))


def find_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's dtype for a name. Raises DareError for a name that is not one of them."""
    if not isinstance(dtype, str):
        return dtype
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    return _DTYPES[dtype]


class Model:
    """A diffusion language model and its tokenizer (None: token ids only)."""

    def __init__(self, family: Family, tokenizer: Any = None) -> None:
        self.family = family
        self.tokenizer = tokenizer

    def logits(self, input_ids: Tensor, is_real: Tensor | None = None, block_length: int | None = None) -> Tensor:
        """float32 [B, S, V]; `logits[:, i]` scores the token at position i (a family's shift is undone).

        input_ids     int64 [B, S], masked positions holding the mask id
        is_real       bool [B, S], False at padding on either side, which changes no real position's logits
        block_length  overrides the grid of a block model; None = the family's own attention
        """
        with torch.no_grad():
            return self.family.logits(input_ids, is_real, block_length)

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        seed: int = 0,
        on_step: Callable[[Any], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        trace_file: str | Path | None = None,
        **decode: Any,
    ) -> list[Completion]:
        """One completion per prompt; options as in `dare.core.decode.Decode`.

        prompts     token ids, text (encoded as it is) or chat messages (rendered with the checkpoint's template)
        trace_file  where to write the rollout for `dare view`, with what every step thought of its open positions
        A completion depends on (weights, its prompt, seed, options), not on the other prompts or their order;
        equal prompts in one call are numbered and differ at temperature > 0.
        Raises DareError for unknown options or a prompt that does not fit.
        """
        try:
            options = Decode.model_validate(decode)
        except ValidationError as error:
            raise explain(error, Decode, where="generate", what="the decode options are") from None
        if isinstance(prompts, str):
            raise DareError("prompts is a list", got="one string", fix="model.generate([text], ...)")
        ids = [self.encode(prompt) for prompt in prompts]
        key = Key(seed).fold("generate")
        num_alternatives = NUM_ALTERNATIVES if trace_file is not None else 0
        trace = denoise(
            self.family,
            ids,
            options,
            key,
            sample_ids_of(ids),
            num_alternatives=num_alternatives,
            on_step=on_step,
            on_progress=on_progress,
        )
        if trace_file is not None:
            piece = partial(token_piece, self.tokenizer)
            save_trace(Path(trace_file), trace, spec=self.family.spec, decode=options, piece=piece)
        return [self.with_text(completion) for completion in to_completions(trace)]

    def log_likelihood(
        self, context: str | Sequence[int], completion: str | Sequence[int], num_samples: int = 128, seed: int = 0
    ) -> float:
        """Monte-Carlo ELBO of `completion` given `context`, in nats (a lower bound, summed over its tokens).

        Exact-count masks stratified over all `num_samples` draws (LLaDA, Nie et al. 2025, eq. 6; block models: the
        sum of block ELBOs); an exact value for one token. See `dare.evals.likelihood`.
        """
        context_ids = self.encode(context)
        if isinstance(completion, str):
            completion_ids = encode_completion(self.require_tokenizer(), completion)
        else:
            completion_ids = list(completion)
        return log_likelihood(self.family, context_ids, completion_ids, num_samples, Key(seed))

    def save(self, path: str | Path) -> Path:
        """Write a HF-layout checkpoint folder, atomically; an existing folder is replaced as a whole.

        Of a model with an adapter only the adapter is written, in the format of `peft`.
        """
        with whole_directory(Path(path)) as temporary:
            save_family(self.family, temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
        return Path(path)

    def encode(self, prompt: PromptLike) -> list[int]:
        """Token ids of a prompt in any of its forms."""
        if isinstance(prompt, str):
            return encode_prompt(self.require_tokenizer(), Prompt(uid="", text=prompt))
        items = list(prompt)
        if items and isinstance(items[0], dict):
            messages = tuple(item for item in items if isinstance(item, dict))
            return encode_prompt(self.require_tokenizer(), Prompt(uid="", messages=messages))
        return [int(item) for item in items]  # type: ignore[call-overload]

    def with_text(self, completion: Completion) -> Completion:
        """The completion with its text, where there is a tokenizer."""
        if self.tokenizer is None:
            return completion
        text = decode_text(self.tokenizer, completion.tokens)
        return Completion(
            tokens=completion.tokens,
            text=text,
            step_map=completion.step_map,
            logp=completion.logp,
            nfe=completion.nfe,
            finish=completion.finish,
        )

    def require_tokenizer(self) -> Any:
        """The tokenizer. Raises DareError if there is none."""
        if self.tokenizer is None:
            raise DareError("this checkpoint has no tokenizer", fix="give token ids instead of text or messages")
        return self.tokenizer


def sample_ids_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What names the random numbers of each prompt of a call: its tokens, and its place among equal ones."""
    seen: Counter[tuple[int, ...]] = Counter()
    sample_ids = []
    for prompt in prompts:
        content = tuple(prompt)
        sample_ids.append(stable_id("prompt", *content, "copy", seen[content]))
        seen[content] += 1
    return sample_ids
