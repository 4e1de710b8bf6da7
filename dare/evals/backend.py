"""What a model must do to be evaluated, and DARE's own models doing it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dare.core.decode import Decode
from dare.core.rng import Key, stable_id
from dare.core.text import Completion, Message, Prompt
from dare.core.types import TraceBatch
from dare.diffusion.trace import to_completions
from dare.evals.benchmarks.base import Style
from dare.evals.likelihood import Likelihood, Request, log_likelihoods
from dare.families.base import Family
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_prompt, encode_text, render_messages
from dare.rollout.engine import denoise

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Stream:
    """A key as a seed and the names below it, which a server can be told."""

    seed: int
    path: tuple[str, ...]

    @property
    def key(self) -> Key:
        """The key itself."""
        return Key(self.seed).fold(*self.path)


@dataclass(frozen=True, slots=True)
class Continuation:
    """A continuation to score after a prompt. Those of one document share `sample_id`, hence their masks."""

    prompt: Prompt
    text: str
    sample_id: int


def continuations(requests: Iterable[tuple[str, str]], before: str = "") -> list[Continuation]:
    """The (context, continuation) pairs of one document, `before` in front of each context, ready to be scored.

    Their masks are named by what is asked and by nothing else, so every harness gets the same numbers for a document,
    wherever it stands in whatever file.
    """
    pairs = [(before + context, text) for context, text in requests]
    sample_id = stable_id("likelihood", *(part for pair in pairs for part in pair))
    return [Continuation(Prompt("", text=context), text, sample_id) for context, text in pairs]


def likelihood_stream(seed: int) -> Stream:
    """The stream of all likelihood masks of a seed."""
    return Stream(seed, ("likelihood",))


class Backend(Protocol):
    """A model that answers prompts and scores continuations; what it says depends on no batch."""

    def generate(
        self, prompts: Sequence[Prompt], decode: Decode, stream: Stream, sample_ids: list[int]
    ) -> list[Completion]:
        """One completion with text per prompt; `sample_ids` key the randomness."""

    def log_likelihoods(self, items: Sequence[Continuation], options: Likelihood, stream: Stream) -> list[float]:
        """Log-likelihood of each continuation, nats."""

    def default_style(self) -> Style:
        """chat if prompts become messages, text if they are continued."""

    def describe(self) -> dict[str, Any]:
        """What identifies the model, as plain data: family, checkpoint, hashes, dtype, device."""


class NativeBackend:
    """A DARE model: the denoising engine of rollouts, and likelihoods by `dare.evals.likelihood`."""

    def __init__(self, family: Family, tokenizer: Any, path: Path | None = None) -> None:
        self.family, self.tokenizer, self.path = family, tokenizer, path

    def generate(
        self, prompts: Sequence[Prompt], decode: Decode, stream: Stream, sample_ids: list[int]
    ) -> list[Completion]:
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        trace: TraceBatch = denoise(self.family, ids, decode, stream.key, sample_ids)
        return [
            Completion(
                tokens=completion.tokens,
                text=decode_text(self.tokenizer, completion.tokens),
                step_map=completion.step_map,
                logp=completion.logp,
                nfe=completion.nfe,
                finish=completion.finish,
            )
            for completion in to_completions(trace)
        ]

    def log_likelihoods(self, items: Sequence[Continuation], options: Likelihood, stream: Stream) -> list[float]:
        requests = [
            Request(*encode_continuation(self.tokenizer, item.prompt, item.text), item.sample_id) for item in items
        ]
        return log_likelihoods(self.family, requests, options, stream.key)

    def text_log_likelihoods(self, texts: Sequence[str], options: Likelihood, stream: Stream) -> list[float]:
        """The ELBO of whole texts, nats: of each window of the model's length, without context, summed."""
        windows: list[tuple[int, list[int]]] = []
        size = self.family.spec.max_length
        for index, text in enumerate(texts):
            ids = encode_text(self.tokenizer, text)
            windows += [(index, ids[start : start + size]) for start in range(0, len(ids), size)]
        requests = [Request([], window, stable_id("window", *window)) for _, window in windows]
        totals = [0.0] * len(texts)
        for (index, _), value in zip(windows, log_likelihoods(self.family, requests, options, stream.key), strict=True):
            totals[index] += value
        return totals

    def are_greedy(self, items: Sequence[Continuation]) -> list[bool]:
        """Whether greedy denoising, one token a step, of as many positions as a continuation has gives just its tokens.

        A masked model denoises them as one block (as LLaDA's evaluation does), a block model in its blocks.
        """
        pairs = [encode_continuation(self.tokenizer, item.prompt, item.text) for item in items]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (_, wanted) in enumerate(pairs):
            by_length[len(wanted)].append(index)
        answers = [False] * len(items)
        for length, indices in by_length.items():
            is_one_block = self.family.spec.block_grid == "completion"
            decode = Decode(gen_length=length, block_length=length if is_one_block else None, eos_stop=False)
            contexts = [pairs[index][0] for index in indices]
            trace = denoise(self.family, contexts, decode, Key(0), list(range(len(indices))))
            for index, completion in zip(indices, to_completions(trace), strict=True):
                answers[index] = completion.tokens[:length] == pairs[index][1]
        return answers

    def num_tokens(self, text: str) -> int:
        """Tokens of plain text."""
        return len(encode_text(self.tokenizer, text))

    def render(self, messages: Iterable[Message], *, is_open: bool) -> str:
        """A conversation as text, whose ids are those of the conversation; `is_open` adds the assistant's header,
        otherwise the last message can be continued. Raises DareError as `encode_messages`."""
        return render_messages(self.tokenizer, messages, is_open=is_open)

    def default_style(self) -> Style:
        return "chat" if self.tokenizer.chat_template else "text"

    def describe(self) -> dict[str, Any]:
        spec = self.family.spec
        return {
            "family": spec.name,
            "checkpoint": None if self.path is None else str(self.path),
            "checkpoint_sha256": None if self.path is None else hash_files(self.path, ("*.safetensors", "config.json")),
            "tokenizer_sha256": None
            if self.path is None
            else hash_files(self.path, ("tokenizer*", "vocab*", "merges*")),
            "chat_template_sha256": _hash_template(self.tokenizer.chat_template),
            "num_parameters": self.family.num_parameters,
            "block_length": spec.block_length,
            "dtype": str(self.family.dtype).removeprefix("torch."),
            "device": str(self.family.device),
        }


def encode_continuation(tokenizer: Any, prompt: Prompt, text: str) -> tuple[list[int], list[int]]:
    """Context and continuation. Plain text is split where the tokens of the whole allow it, as lm-eval does."""
    context = encode_prompt(tokenizer, prompt)
    if prompt.text is not None:
        whole = encode_text(tokenizer, prompt.text + text)
        if whole[: len(context)] == context and len(whole) > len(context):
            return context, whole[len(context) :]
    return context, encode_text(tokenizer, text)


def hash_files(folder: Path, patterns: Sequence[str]) -> str | None:
    """SHA-256 over the names and contents of the files of a folder that match; None if none does."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not found:
        return None
    total = hashlib.sha256()
    for path in found:
        total.update(path.name.encode() + b"\0" + hash_file(path).encode())
    return total.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_template(template: Any) -> str | None:
    return None if not template else hashlib.sha256(str(template).encode()).hexdigest()
