"""The verb `dare average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def average(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="checkpoint folders, or one run folder", show_default=False),
    ],
    *,
    out: Annotated[Path, typer.Option(help="folder to write")],
    last: Annotated[int | None, typer.Option(min=2, help="of a run: its newest checkpoints; default: all")] = None,
) -> None:
    """Average: a checkpoint whose weights are the mean of several of the same model.

    A run folder stands for the checkpoints that it has kept (checkpoint.keep_last). The tokenizer is the first one's.

    \b
    Examples:
      dare average runs/sft --last 3 --out runs/sft-mean
      dare average runs/a/checkpoints/best runs/b/checkpoints/best --out models/soup
    """
    from dare import api

    folders = api.average(checkpoints, out, last=last)
    typer.echo(f"{out}: the mean of {', '.join(str(folder) for folder in folders)}")
