"""The base of every user-facing configuration class."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Frozen and strict: an unknown key is an error, and defaults live on the fields and nowhere else."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
