"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from dare.core.errors import DareError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Configs, weights, tokenizers; and code, which is saved again with a trained model but never run.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.py"]


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """An existing folder as it is; otherwise the local copy of a Hugging Face repository, downloaded if needed.

    Configs, safetensors, tokenizer and code files are fetched, never pickles; code is not run. Raises DareError if
    there is no such folder and no such repository, or the hub cannot be reached and has not been before.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise DareError("a checkpoint is a folder", where=name, got="a file", fix="give the folder that holds it")
    if not _HUB_ID.fullmatch(name):
        raise DareError(
            f"no checkpoint at {name}",
            expected="a folder with config.json and model.safetensors, or a hub id such as organisation/model",
            fix="check the path",
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DareError(
            f"no folder {name}, and it cannot be fetched from the Hugging Face hub",
            got=f"{type(error).__name__}: {first_line}",
            fix="check the name and the network, or give the path of a downloaded checkpoint",
        ) from None
