"""Which rows to train on, how they become tokens, and which tokens carry loss. Schema only; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dare.core.options import Options

RowFormat = Literal["messages", "prompt_completion", "preference", "prompt_only", "text", "tokens"]
Column = Literal["messages", "prompt", "completion", "chosen", "rejected", "text", "input_ids", "labels", "answer"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
EosPolicy = Literal["none", "one", "fill", "fill_row", "block", "align"]
TooLong = Literal["error", "drop", "left", "right"]
BadRow = Literal["error", "skip"]
LossTurns = Literal["last", "all"]


class _Columns(Options):
    """What the columns of a source mean."""

    split: str = Field("train", description="which split of a data set that has several")
    format: RowFormat | None = Field(
        None,
        description="messages; prompt_completion; preference: chosen and rejected; prompt_only; text: raw text, all of "
        "it learnt; tokens: input_ids and labels (-100 carries no loss); default: by the columns",
    )
    columns: dict[Column, str] = Field(
        {},
        description="what the data calls a column, for example {prompt: question, completion: answer}; a.b is the "
        "field b of the column a",
    )


class RowSource(_Columns):
    """One file, folder or data set."""

    path: str = Field(
        description="JSON lines (.gz too), Parquet, a folder of those or saved by `datasets`, or a hub id"
    )


class MixedSource(RowSource):
    """A source of several."""

    weight: float = Field(1.0, gt=0.0, description="share of the rows drawn, relative to the other sources")


class DataRecipe(_Columns):
    """Offline rows: a source or a mixture, or (without either) the task's training problems and answers."""

    path: str | None = Field(None, description="one source; default: the task's problems")
    sources: tuple[MixedSource, ...] = Field(
        (), description="several sources instead of path, drawn by weight: {path, split, format, columns, weight}"
    )
    is_streaming: bool = Field(
        False, description="rows are read while training, in file order, shuffled within windows; never all in memory"
    )
    shuffle_window: int = Field(1000, ge=1, description="is_streaming: rows that are shuffled among themselves")
    is_chat: bool = Field(False, description="text prompts and completions become a user's and an assistant's message")
    system: str | None = Field(None, description="system message of conversations that have none")
    loss_turns: LossTurns = Field("last", description="messages: which turns of loss_roles carry loss")
    loss_roles: tuple[Role, ...] = Field(("assistant",), min_length=1, description="messages: whose turns carry loss")
    eos: EosPolicy | None = Field(
        None,
        description="what follows a completion, all of it with loss. none: nothing; one: one EOS; fill: EOS up to "
        "gen_length (LLaDA); fill_row: EOS up to max_length, prompt included (d1, Dream); block: one EOS and then EOS "
        "up to the end of its block; align: EOS up to the end of its block, none if it ends there (A2D); default: fill "
        "for full attention, block for block models; raw text: one instead of fill",
    )
    gen_length: int | None = Field(
        None, ge=1, description="for eos: fill, completion positions; default: decode.gen_length"
    )
    max_length: int | None = Field(None, ge=2, description="prompt + completion, tokens; default: the model's")
    crop_rate: float = Field(
        0.0, ge=0.0, le=1.0, description="raw text: share of rows of which a random length is kept (LLaDA: 0.01)"
    )
    on_too_long: TooLong = Field(
        "error",
        description="error; drop: leave the row out; right: cut the end of the completion, without an EOS; left: cut "
        "the beginning of the prompt; raw text is split into rows instead",
    )
    on_bad_row: BadRow = Field("error", description="error: name the first malformed row; skip: leave it out, counted")

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        if self.gen_length is not None and self.eos not in (None, "fill"):
            raise ValueError(f"gen_length needs eos: fill, got eos: {self.eos}; remove gen_length or change eos")
        if self.eos == "fill_row" and self.max_length is None:
            raise ValueError("eos: fill_row fills rows up to max_length; give max_length")
        if self.path is not None and self.sources:
            raise ValueError("give one source as path or several as sources, not both")
        if self.sources and (self.format is not None or self.columns or self.split != "train"):
            raise ValueError("split, format and columns belong to each of the sources")
        if self.is_streaming and self.path is None and not self.sources:
            raise ValueError("is_streaming needs a path or sources")
        return self

    @property
    def all_sources(self) -> tuple[MixedSource, ...]:
        """The sources, one or several; none for the task's own problems."""
        if self.path is None:
            return self.sources
        return (MixedSource(path=self.path, split=self.split, format=self.format, columns=self.columns),)
