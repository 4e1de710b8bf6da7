"""Which rows to train on, how they become tokens, and which tokens carry loss. Schema only; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dare.core.options import Options

RowFormat = Literal["prompt_completion", "messages", "prompt_only"]
EosPolicy = Literal["none", "one", "fill", "block"]
TooLong = Literal["error", "drop", "truncate"]
LossTurns = Literal["last", "all"]


class DataRecipe(Options):
    """Offline rows: a file or data set, or (without a path) the task's training problems and answers."""

    path: str | None = Field(
        None, description="JSON lines, Parquet, a folder saved by `datasets`, or a hub id; default: the task's problems"
    )
    split: str = Field("train", description="which split of a data set that has several")
    format: RowFormat | None = Field(
        None,
        description="prompt_completion: columns prompt and completion, text or messages; messages: a column of that "
        "name; prompt_only: for generation; default: by the columns",
    )
    loss_turns: LossTurns = Field("last", description="messages: which assistant turns carry loss")
    eos: EosPolicy | None = Field(
        None,
        description="what follows a completion, all of it with loss. none: nothing; one: one EOS; fill: EOS up to "
        "gen_length (LLaDA); block: one EOS and then EOS up to the end of its block; default: fill for full attention, "
        "block for block models",
    )
    gen_length: int | None = Field(
        None, ge=1, description="for eos: fill, completion positions; default: decode.gen_length"
    )
    max_length: int | None = Field(None, ge=2, description="prompt + completion, tokens; default: the model's")
    on_too_long: TooLong = Field(
        "error", description="error; drop: leave the row out; truncate: cut the completion, without an EOS"
    )

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        if self.gen_length is not None and self.eos not in (None, "fill"):
            raise ValueError(f"gen_length needs eos: fill, got eos: {self.eos}; remove gen_length or change eos")
        return self
