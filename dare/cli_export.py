"""The verb `dare export`; its body imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare.cli_options import Base, Checkpoint, Device, Dtype, find_place


def export(
    checkpoint: Checkpoint,
    *,
    to: Annotated[Path, typer.Option(help="folder to write; must not exist", show_default=False)],
    is_merged: Annotated[
        bool, typer.Option("--merge/--adapter", help="a whole model, an adapter merged into its base; or the adapter")
    ] = True,
    base: Base = None,
    device: Device = "cpu",
    dtype: Dtype = "checkpoint",
) -> None:
    """Export: a folder to publish or to use elsewhere, without the trainer's state, verified before it appears.

    An adapter is merged into its base and stored in the base's dtype: the merged model must differ from the base,
    have its tensors, and give the adapter's logits. A run folder stands for its newest checkpoint.

    \b
    Examples:
      dare export runs/lora --to models/merged
      dare export runs/lora/checkpoints/step-000100 --adapter --to models/adapter
      dare export runs/sft/checkpoints/best --to models/best
    """
    torch_device, torch_dtype = find_place(device, dtype)
    from dare import exports

    if is_merged:
        typer.echo(exports.export(checkpoint, to, base=base, dtype=torch_dtype, device=torch_device).text())
    else:
        typer.echo(exports.export_adapter(checkpoint, to).text())
