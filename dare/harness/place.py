"""Where the model of a harness is: a checkpoint that is loaded here, or a server."""

from __future__ import annotations

from dare.api import evaluation_backend
from dare.cli_options import load_model
from dare.evals.backend import Backend
from dare.evals.remote import is_url


def load_backend(checkpoint: str, device: str = "auto", dtype: str = "checkpoint", base: str | None = None) -> Backend:
    """The evaluation back end of a checkpoint, with the words of the command line, or of a server's URL.

    Raises DareError as `dare.load`, or if there is no server.
    """
    if is_url(checkpoint):
        return evaluation_backend(checkpoint)
    return evaluation_backend(load_model(checkpoint, device, dtype, base), checkpoint)
