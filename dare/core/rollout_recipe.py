"""Who denoises the rollouts of an online run: DARE itself, or servers that somebody else has started. No torch."""

from __future__ import annotations

import ipaddress
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dare.core.errors import DareError
from dare.core.options import Options

RolloutEngine = Literal["dare", "sglang", "lmdeploy"]


class RolloutRecipe(Options):
    """With a server, `decode` says how the server was started; what a request can carry is sent (see `docs/remote.md`).

    A server on another machine needs an API key and a folder for weights that both see.
    """

    engine: RolloutEngine = Field("dare", description="dare: in the trainer's process; else what the servers are")
    urls: tuple[str, ...] = Field((), description="one server or several, http://127.0.0.1:30000")
    api_key_env: str | None = Field(None, min_length=1, description="environment variable that holds the API key")
    weights_dir: str | None = Field(
        None, min_length=1, description="folder for updated weights; default: a temporary one on this machine"
    )
    commit_logp: Literal["server", "scored"] = Field(
        "server",
        description="log-probs at commit: those of the server, if it returns any, or computed again by the trainer "
        "from the step map, which hides every mismatch",
    )
    is_eos_ignored: bool = Field(
        True,
        description="let the server go on after an EOS, so that the block that holds it is whole and can be replayed; "
        "false: it stops there, and the rest of that block counts as never sampled",
    )
    max_gap: float = Field(
        0.5, gt=0.0, description="largest mean |server - trainer| log-prob of a probe, nats, before it is another model"
    )
    concurrency: int = Field(64, ge=1, description="requests under way at once, over all servers")
    timeout_s: float = Field(300.0, gt=0.0, description="longest that one request may take, seconds")
    deadline_s: float = Field(
        1800.0, gt=0.0, description="longest that one rollout may take, retries included, seconds"
    )
    retries: int = Field(4, ge=0, description="further attempts of a request on one server")
    backoff_s: float = Field(0.5, ge=0.0, description="pause before the first further attempt; doubles each time")

    @field_validator("urls", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"cannot use '{url}'; give http://HOST:PORT")
            if parts.username is not None or parts.password is not None:
                raise DareError(  # not ValueError, whose message would repeat it
                    "a url must not hold a key or password",
                    where="rollout.urls",
                    got=f"one for {parts.hostname}",
                    fix="name the variable that holds the API key in rollout.api_key_env",
                )
        cleaned = tuple(url.rstrip("/") for url in urls)
        if len(set(cleaned)) != len(cleaned):
            raise ValueError(f"a server is listed twice: {', '.join(cleaned)}")
        return cleaned

    @model_validator(mode="after")
    def _check(self) -> RolloutRecipe:
        if not self.is_remote:
            if self != RolloutRecipe.model_construct():
                raise ValueError("engine: dare has no further options; set engine: sglang or lmdeploy, or remove them")
            return self
        if not self.urls:
            raise ValueError(f"engine: {self.engine} needs the servers; give urls: [http://127.0.0.1:30000]")
        far = [url for url in self.urls if not is_loopback(url)]
        if far and (self.api_key_env is None or self.weights_dir is None):
            raise ValueError(
                f"{far[0]} is not on this machine; give api_key_env (the variable that holds its API key) and "
                "weights_dir (a folder that both machines see under the same path)"
            )
        return self

    @property
    def is_remote(self) -> bool:
        """Whether another program denoises."""
        return self.engine != "dare"


def is_loopback(url: str) -> bool:
    """Whether a url names this machine itself."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
