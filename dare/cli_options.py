"""What several verbs of the command line take, and how their words become a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dare.core.errors import DareError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe, YAML", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="dotted keys of the recipe with YAML values", show_default=False),
]
DecodeOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="decode options, such as gen_length=64", show_default=False),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="checkpoint folder, run folder or hub id", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or checkpoint for the one it was saved with")]


Base = Annotated[str | None, typer.Option(help="for an adapter: its base model; default: the one it names")]


def load_model(checkpoint: str, device: str, dtype: str, base: str | None = None) -> Any:
    """A model, with the words of the command line turned into torch's."""
    from dare.model import load

    torch_device, torch_dtype = find_place(device, dtype)
    return load(checkpoint, dtype=torch_dtype, device=torch_device, base=base)


def find_place(device: str, dtype: str) -> tuple[str, Any]:
    """torch's device and dtype (None: the checkpoint's) for the words of the command line."""
    from dare.core.errors import unknown_name

    dtypes, devices = ("checkpoint", "float32", "bfloat16"), ("auto", "cpu", "cuda")
    if device not in devices:
        raise unknown_name("device", device, devices, where="--device")
    if dtype not in dtypes:
        raise unknown_name("dtype", dtype, dtypes, where="--dtype")
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise DareError("there is no CUDA device", where="--device", fix="use --device cpu")
    wanted = {"checkpoint": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return "cuda" if has_cuda and device != "cpu" else "cpu", wanted


def token_text(tokenizer: Any) -> Callable[[int], str]:
    """How one token looks in a canvas; without a tokenizer its id does."""
    from dare.families.tokenizer import decode

    def text(token: int) -> str:
        return f"{token} " if tokenizer is None else decode(tokenizer, [token], has_special=True)

    return text
