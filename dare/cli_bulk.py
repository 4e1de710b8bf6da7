"""What `dare generate --file --out` does; like the verbs of `dare.cli`, it imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path

import typer

from dare.cli_options import load_model
from dare.core.errors import DareError


def bulk_generate(
    checkpoint: str, file: Path, out: Path, words: list[str], *, is_chat: bool, seed: int, device: str, dtype: str
) -> None:
    """Complete every prompt of `file` into `out`, with a bar on a terminal and a line at the end."""
    from dare.terminal.settings import generation_options, read_prompt_file

    if out.exists() and out.samefile(file):
        raise DareError("the output would replace the prompts", where="--out", got=str(out), fix="choose another --out")
    prompts = read_prompt_file(file, is_chat=is_chat)
    if not prompts:
        raise DareError("there is no prompt", where=str(file), expected="at least one line")
    options = generation_options(checkpoint, words)
    model = load_model(checkpoint, device, dtype)
    from pydantic import ValidationError

    from dare.core.decode import Decode
    from dare.core.recipe_errors import explain
    from dare.terminal.bulk import generate_file
    from dare.terminal.progress import progress_bar

    try:
        decode = Decode.model_validate(options)
    except ValidationError as error:
        raise explain(error, Decode, where="generate", what="the decode options are") from None
    try:
        with progress_bar("denoising") as on_progress:
            result = generate_file(
                model, prompts, out, decode, seed=seed, checkpoint=checkpoint, on_progress=on_progress
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command continues") from error
    kept = f", {result.num_kept} of them from before" if result.num_kept else ""
    typer.echo(f"{out}: {result.num_total} completions{kept}")
