"""What clients send, and what they get. Fields of the OpenAI API keep their names; DARE's own are under `dare`.

Values that would change what OpenAI's models do, and that a diffusion model here does not do, are refused, never
ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from dare.evals.likelihood import Likelihood

MAX_STOPS = 16
_MAX_SEED = 2**63 - 1
_MAX_CHARACTERS = 2**20

Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Text = Annotated[str, StringConstraints(max_length=_MAX_CHARACTERS)]
KeyPart = Annotated[str, StringConstraints(max_length=256)] | Seed


class _Body(BaseModel):
    """Strict: an unknown field or a number as a string is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DareFields(_Body):
    """What a diffusion model has and the OpenAI API does not."""

    decode: dict[str, Any] = Field(default_factory=dict, description="decode options, as in a recipe's `decode`")
    sample_ids: list[Seed] | None = Field(
        None, description="what names the random numbers of each completion; default: those of dare.generate"
    )
    key: list[KeyPart] = Field(
        ["generate"], max_length=8, description="the stream of random numbers below the seed; default: dare.generate's"
    )
    details: bool = Field(False, description="with each choice: token ids, step map, log-probs, forwards, prompt ids")
    canvas: bool = Field(False, description="with stream: send the canvas after denoising steps")


class StreamOptions(_Body):
    include_usage: bool | None = False


class Generation(_Body):
    """What both endpoints that generate take."""

    model: str | None = None
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0.0, le=100.0, description="default: the server's, usually 0")
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    n: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="ignored")
    frequency_penalty: float | None = Field(None, ge=0.0, le=0.0, description="not supported: only 0")
    presence_penalty: float | None = Field(None, ge=0.0, le=0.0, description="not supported: only 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="not supported")
    dare: DareFields = DareFields()

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a completion."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_usage_chunk(self) -> bool:
        """Whether the stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Generation):
    prompt: Text | list[Text] | TokenIds | list[TokenIds] = Field(
        description="text or token ids, one prompt or a list of them"
    )
    max_tokens: int | None = Field(None, ge=1, description="default: the server's gen_length")
    best_of: Literal[1] | None = Field(None, description="not supported: only 1")
    echo: Literal[False] | None = Field(None, description="not supported")
    logprobs: None = Field(None, description="not supported; see dare.details")
    suffix: None = Field(None, description="not supported")


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: Text | list[TextPart]
    name: str | None = Field(None, description="ignored")

    @property
    def plain(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ChatBody(Generation):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="default: the server's gen_length")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same as max_tokens")
    logprobs: Literal[False] | None = Field(None, description="not supported; see dare.details")


class LikelihoodItem(_Body):
    """A continuation to score after a context. Text is split into tokens as the native evaluation does."""

    context: Text | TokenIds | list[ChatMessage]
    continuation: Text | TokenIds
    sample_id: Seed | None = Field(None, description="keys the masks; default: that of Model.log_likelihood")


class LikelihoodBody(_Body):
    model: str | None = None
    items: list[LikelihoodItem] = Field(min_length=1)
    likelihood: dict[str, Any] = Field(
        default_factory=dict, description=f"settings of the estimator: {', '.join(Likelihood.model_fields)}"
    )
    seed: Seed | None = None
    key: list[KeyPart] = Field([], max_length=8, description="the stream of random numbers below the seed")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Details(BaseModel):
    """What `dare.details` asks for; lists cover the choice's tokens."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    step_map: list[int]
    logp: list[float]
    nfe: int
    finish: str


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"]
    dare: Details | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]
    dare: Details | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class LikelihoodValue(BaseModel):
    index: int
    log_likelihood: float = Field(description="nats")
    num_tokens: int


class LikelihoodAnswer(BaseModel):
    object: Literal["dare.loglikelihood"]
    model: str
    data: list[LikelihoodValue]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "draining", "failed"]
    model: str
