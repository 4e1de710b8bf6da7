"""Strict reading of a checkpoint's config.json, and the neutral sizes that dense networks are built from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from dare.core.errors import DareError
from dare.core.spec import BlockGrid

Config = dict[str, Any]
MAX_INTEGER, MAX_NUMBER, MAX_LAYERS = 2**31 - 1, 1e30, 1000  # beyond what any model has


@dataclass(frozen=True)
class DenseShape:
    """A dense pre-norm transformer, whatever its family calls the fields."""

    vocab_size: int  # rows of the embedding and of the head
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float
    norm_eps: float
    is_tied: bool  # the head is the embedding
    logit_scale: float = 1.0
    rotary_fraction: float = 1.0  # of a head's dimensions, from the first on
    has_qkv_bias: bool = False
    has_qk_norm: bool = False  # queries and keys are normalised per head

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return int(self.head_dim * self.rotary_fraction)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise DareError(
                "the query heads cannot be shared out among the key/value heads",
                where="config.json",
                got=f"{self.num_heads} heads, {self.num_kv_heads} key/value heads",
                expected="a multiple",
            )
        if self.head_dim % 2:
            raise DareError("rotary embedding needs an even head size", where="config.json", got=self.head_dim)
        if not 0 < self.rotary_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise DareError(
                "the rotary part of a head must be an even number of its dimensions",
                where="config.json, partial_rotary_factor",
                got=f"{self.rotary_fraction:g} of head size {self.head_dim}",
            )


@dataclass(frozen=True)
class MoEShape:
    """The layers of a transformer whose feed-forward part is a mixture of experts."""

    num_experts: int
    experts_per_token: int
    expert_size: int
    is_moe: tuple[bool, ...]  # per layer; the others have a dense feed-forward part
    shared_size: int = 0  # width of an expert that every token takes; 0 = none

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise DareError(
                "a token cannot take more experts than there are",
                where="config.json, num_experts_per_tok",
                got=self.experts_per_token,
                expected=f"<= {self.num_experts}",
            )


@dataclass(frozen=True)
class ModelSizes:
    """What a new model is made of. `None` leaves a choice to the family."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    mlp_size: int
    max_length: int  # positions the model can address, tokens
    mask_id: int
    eos_id: int
    pad_id: int
    block_length: int | None
    tie_embeddings: bool
    head_dim: int | None = None  # for families whose heads may have another size than hidden_size / num_heads
    rope_theta: float | None = None
    norm_eps: float | None = None


def code_map(module: str, config_class: str, model_class: str, base_class: str | None = None) -> dict[str, str]:
    """The `auto_map` of a new config: where the official code has its classes, for those who load with that code.

    Nothing here runs it; its files have to be put beside the weights (see `Family.code_files`).
    """
    model = f"modeling_{module}.{model_class}"
    return {
        "AutoConfig": f"configuration_{module}.{config_class}",
        "AutoModel": model if base_class is None else f"modeling_{module}.{base_class}",
        "AutoModelForCausalLM": model,
    }


class Fields:
    """The fields of one config.json. What is asked for and absent, malformed or not implemented is a DareError.

    Fields that nobody asks for are none of a network's business; they are kept and saved as they are.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer from `minimum` to `MAX_INTEGER`; an absent or null field takes `default` if there is one."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self._wrong(name, value, f"an integer >= {minimum}")
        if value > MAX_INTEGER:
            raise self._wrong(name, value, f"an integer <= {MAX_INTEGER}")
        return value

    def layers(self, name: str) -> int:
        """A number of layers: bounded, because a network is built layer by layer before its weights are looked at."""
        value = self.integer(name)
        if value > MAX_LAYERS:
            raise self._wrong(name, value, f"at most {MAX_LAYERS} layers")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, at most `MAX_NUMBER`; an absent or null field takes `default` if there is one."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_NUMBER:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """true or false; an absent or null field takes `default` if there is one."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def block_grid(self) -> BlockGrid:
        """Where the blocks of a block model count from; published configs have no such field and mean "sequence"."""
        value = self._value("block_grid", "sequence")
        if value not in get_args(BlockGrid):
            raise self._wrong("block_grid", value, " or ".join(get_args(BlockGrid)))
        grid: BlockGrid = value
        return grid

    def token(self, name: str, vocab_size: int, default: int | None = None) -> int:
        """A token id below `vocab_size`."""
        value = self.integer(name, default, minimum=0)
        if value >= vocab_size and self.config.get(name) is None:
            raise DareError(
                f"the model config has no field '{name}', and the one of the published models is not in its vocabulary",
                where=f"config.json, {name}",
                got=value,
                expected=f"a token id below the vocabulary size {vocab_size}",
                fix=f"add {name} to config.json",
            )
        if value >= vocab_size:
            raise self._wrong(name, value, f"a token id below the vocabulary size {vocab_size}")
        return value

    def check(self, implemented: Mapping[str, Iterable[object]], *, is_required: bool = False) -> None:
        """Each field must hold one of the values listed for it; only `is_required` ones must be present.

        Give fields as required whose default in the official code differs from what is implemented.
        """
        for name, values in implemented.items():
            allowed = tuple(values)
            if name not in self.config and not is_required:
                continue
            value = self._value(name, None) if is_required else self.config[name]
            if not any(value == option for option in allowed):
                shown = " or ".join(_as_json(option) for option in allowed)
                raise self._wrong(name, value, f"{shown}; nothing else is implemented")

    def divides(self, name: str, value: int, of: str, whole: int) -> None:
        """Raise DareError unless `value` of field `name` divides `whole` of field `of`."""
        if whole % value:
            raise self._wrong(name, value, f"a divisor of {of} {whole}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            raise DareError(f"the model config has no field '{name}'", where="config.json", fix="add it")
        return value

    def _wrong(self, name: str, value: object, expected: str) -> DareError:
        return DareError(
            f"the model config's field '{name}' cannot be used",
            where=f"config.json, {name}",
            got=_as_json(value),
            expected=expected,
        )


def eos_ids(
    config: Config, generation_config: Config | None, vocab_size: int, default: int | None = None
) -> tuple[int, ...]:
    """Every EOS id of config.json and generation_config.json (each an id or a list), the config's own first.

    `default` is the id of a family whose configs name none. Raises DareError if there is no id at all, or one is not
    a token id.
    """
    found: list[int] = []
    for source, values in (("config.json", config), ("generation_config.json", generation_config or {})):
        value = values.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise DareError(
                    "eos_token_id is not a token id",
                    where=source,
                    got=_as_json(token),
                    expected=f"an integer (or a list of integers) in [0, {vocab_size})",
                )
            found.append(token)
    if not found and default is not None:
        return (default,)
    if not found:
        raise DareError(
            "the model config names no EOS token", where="config.json, eos_token_id", fix="add eos_token_id"
        )
    return tuple(dict.fromkeys(found))


def matches_architecture(config: Config, model_type: str, architecture: str) -> bool:
    """Whether a config is of `architecture`; `model_type` decides only where no architecture is given.

    Families share model types (LLaDA and LLaDA-MoE), but never architectures.
    """
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return architecture in architectures
    return config.get("model_type") == model_type


def _as_json(value: object) -> str:
    return json.dumps(value, default=str)[:200]
