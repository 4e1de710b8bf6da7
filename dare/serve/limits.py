"""What one client may ask of the server, and how long it may take."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from dare.core.options import Options
from dare.core.recipe_errors import explain


class Limits(Options):
    """Bounds of requests; what goes beyond one of them is refused before it costs anything."""

    max_body_bytes: int = Field(2**20, ge=1024, description="size of a request")
    max_prompt_tokens: int = Field(4096, ge=1, description="tokens of a prompt, or of context and continuation")
    max_tokens: int = Field(1024, ge=1, description="completion tokens")
    max_choices: int = Field(64, ge=1, description="completions of one request: prompts times n")
    max_items: int = Field(256, ge=1, description="continuations of one /v1/loglikelihood request")
    max_samples: int = Field(1024, ge=1, description="Monte-Carlo draws per continuation")
    max_requests: int = Field(1024, ge=1, description="requests that are read, worked on or answered at the same time")
    max_queue: int = Field(1024, ge=1, description="completions that wait for a seat, of all clients")
    timeout_s: float = Field(600.0, gt=0.0, description="seconds until a request is given up")
    read_timeout_s: float = Field(15.0, gt=0.0, description="seconds for a client to send its request")
    write_timeout_s: float = Field(30.0, gt=0.0, description="seconds for a client to take a piece of its answer")
    drain_s: float = Field(30.0, ge=0.0, description="seconds that running requests get when the server is stopped")

    @property
    def max_steps(self) -> int:
        """Denoising steps that a fixed schedule may have."""
        return 4 * self.max_tokens


def read_limits(words: dict[str, Any]) -> Limits:
    """Limits from plain data. Raises DareError naming what is wrong."""
    try:
        return Limits.model_validate(words)
    except ValidationError as error:
        raise explain(error, Limits, where="--limit", what="the limits are") from None
