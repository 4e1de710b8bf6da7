"""A checkpoint behind `dare.remote.server`, until somebody ends it."""

from __future__ import annotations

import torch
import uvicorn

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.families.checkpoint import load_checkpoint
from dare.families.hub import resolve_checkpoint
from dare.families.lora import merge_adapter
from dare.remote.host import Host
from dare.remote.server import APPS
from dare.training.checkpoint import resolve_model_path


def serve(
    checkpoint: str,
    decode: Decode,
    *,
    contract: str,
    address: tuple[str, int],
    api_key: str | None,
    place: str,
    dtype: torch.dtype | None,
) -> None:
    """Load and answer until interrupted. Raises DareError for a checkpoint or options that do not fit."""
    folder = resolve_checkpoint(resolve_model_path(checkpoint))
    family = load_checkpoint(folder, dtype, torch.device(place), is_quantized=False)
    if family.adapter is not None:
        merge_adapter(family)
    if family.spec.attention != "block_causal":
        raise DareError(
            "rollout servers run block models", where=checkpoint, got=f"family {family.spec.name}, full attention"
        )
    host = Host(family, decode, checkpoint)
    try:
        uvicorn.run(APPS[contract](host, api_key), host=address[0], port=address[1], access_log=False)
    finally:
        host.close()
