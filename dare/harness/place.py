"""Where the model of a harness is: a checkpoint that is loaded here."""

from __future__ import annotations

from dare.api import evaluation_backend
from dare.cli_options import load_model
from dare.evals.backend import Backend


def load_backend(checkpoint: str, device: str = "auto", dtype: str = "checkpoint", base: str | None = None) -> Backend:
    """A checkpoint's evaluation back end, with the words of the command line. Raises DareError as `dare.load`."""
    return evaluation_backend(load_model(checkpoint, device, dtype, base), checkpoint)
