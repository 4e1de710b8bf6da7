"""The verbs `dare chat` and `dare convert`; like those of `dare.cli`, their bodies import what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dare.cli_options import Base, Checkpoint, DecodeOptions, Device, Dtype, load_model


def chat(
    checkpoint: Checkpoint,
    overrides: DecodeOptions = None,
    *,
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    seed: Annotated[int, typer.Option(min=0, help="for temperature > 0")] = 0,
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = "checkpoint",
) -> None:
    """Chat: a conversation, one line a message, rendered with the checkpoint's own template.

    /reset forgets the conversation, /exit leaves. Lines may also come from a pipe.

    \b
    Examples:
      dare chat GSAI-ML/LLaDA-8B-Instruct gen_length=128 temperature=0.7
      printf 'Who are you?\\nAnd in one word?\\n' | dare chat runs/sft
    """
    from dare.terminal.settings import parse_options

    decode = parse_options(overrides or [])
    model = load_model(checkpoint, device, dtype, base)
    import sys

    from dare.terminal.chat import Chat, read_lines

    conversation = Chat(model, decode, seed=seed, system=system)
    conversation.run(read_lines(conversation.console), is_interactive=sys.stdin.isatty())


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="folder or hub id, or a GGUF file", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)],
    *,
    to: Annotated[str, typer.Option(help="llada or dream (masked), sdar (block)")],
    shift: Annotated[str | None, typer.Option(help="keep (dream) or drop; default: what the family does")] = None,
    mask_token: Annotated[str | None, typer.Option(help="name of the token to add")] = None,
    block_length: Annotated[int | None, typer.Option(min=1, help="block grid; default: the family's")] = None,
    dtype: Dtype = "checkpoint",
) -> None:
    """Convert an autoregressive checkpoint (Llama, Qwen2 or Qwen3) into a diffusion model to be trained.

    A mask token is added and the causal mask goes; every weight stays. Llama fits llada and dream, Qwen2 dream,
    Qwen3 sdar.

    \b
    Example:
      dare convert Qwen/Qwen3-0.6B models/qwen3-sdar --to sdar --block-length 8
    """
    from dare.core.errors import unknown_name
    from dare.core.registry import check_name

    check_name("families", to, where="--to")
    if shift not in (None, "keep", "drop"):
        raise unknown_name("shift", shift, ("keep", "drop"), where="--shift")
    from dare import api

    options: dict[str, Any] = {} if mask_token is None else {"mask_token": mask_token}
    options["dtype"] = None if dtype == "checkpoint" else dtype
    model = api.convert(source, out, to, shift=shift, block_length=block_length, **options)  # type: ignore[arg-type]
    spec = model.family.spec
    typer.echo(
        f"{out}: {spec.name}, {model.family.num_parameters:,} parameters, mask token {spec.mask_id}, "
        f"shift {'kept' if spec.is_shifted else 'dropped'}; train it before use"
    )
