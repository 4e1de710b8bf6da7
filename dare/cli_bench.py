"""The verb `dare bench`; like those of `dare.cli`, its body imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dare.cli_options import DecodeOptions
from dare.core.errors import DareError, unknown_name

if TYPE_CHECKING:
    from dare.bench.rollout import Measurement

bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench_app.callback()
def _bench() -> None:
    """Measure this machine."""


@bench_app.command(short_help="Tokens per second of the denoising engine, and where they go.")
def rollout(
    overrides: DecodeOptions = None,
    *,
    family: Annotated[str, typer.Option(help="llada (masked), sdar (block), dream; random weights")] = "llada",
    num: Annotated[int, typer.Option(min=1, help="prompts, denoised together")] = 1,
    prompt_length: Annotated[int, typer.Option(min=1, help="tokens")] = 128,
    width: Annotated[int, typer.Option(min=8, help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(min=1)] = 8,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="default: heads")] = None,
    mlp: Annotated[int, typer.Option(min=1, help="width of the feed-forward part")] = 1536,
    vocab: Annotated[int, typer.Option(min=64)] = 32768,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="runs of each sampler; the fastest counts")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    has_plain: Annotated[bool, typer.Option("--plain/--no-plain", help="also run the plain sampler")] = True,
    plain_batch: Annotated[int, typer.Option(min=1, help="its static batch, masked models without a cache")] = 1,
    is_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Bench: the engine on random weights, next to a plain sampler with the same weights and prompts.

    Seconds are CPU time, so that a busy machine disturbs less. The plain sampler computes logits everywhere, takes
    float64 probabilities and noise, and does not batch block models.

    \b
    Examples:
      dare bench rollout gen_length=32 block_length=32 steps_per_block=8
      dare bench rollout --family sdar --kv-heads 4 --num 8 gen_length=32 block_length=4 temperature=1.0
      dare bench rollout --width 64 --layers 2 --vocab 512 --mlp 128 gen_length=16 block_length=8 cache=dual
    """
    if dtype not in ("float32", "bfloat16"):
        raise unknown_name("dtype", dtype, ("float32", "bfloat16"), where="--dtype")
    if width % heads:
        raise DareError("heads divide the width", where="--heads", got=f"{heads} heads, width {width}")
    from pydantic import ValidationError

    from dare.core.decode import Decode
    from dare.core.recipe_errors import explain
    from dare.core.registry import check_name
    from dare.terminal.settings import parse_options

    check_name("families", family, where="--family")
    try:
        decode = Decode.model_validate(parse_options(overrides or []))
    except ValidationError as error:
        raise explain(error, Decode, where="bench rollout", what="the decode options are") from None
    import torch

    from dare.bench.rollout import Shape, measure

    torch.set_num_threads(threads)
    shape = Shape(family, width, layers, heads, kv_heads, mlp, vocab, prompt_length, num)
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    result = measure(shape, decode, dtype=wanted, num_repeats=repeats, has_plain=has_plain, plain_batch=plain_batch)
    if is_json:
        import json

        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        typer.echo(_text(result))


def _text(result: Measurement) -> str:
    total = sum(result.seconds_by_part.values())
    parts = ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in result.seconds_by_part.items())
    lines = [
        f"engine      {result.seconds:.3f} s, {result.num_tokens} tokens, {result.tokens_per_second:.1f} tokens/s",
        f"forwards    {result.nfe:.1f} a row, {result.tokens_per_forward:.2f} tokens each, {result.num_forwards} calls",
        f"operations  {result.flops / 1e9:.1f} GFLOP, {result.flops_per_second / 1e9:.1f} GFLOP/s, "
        f"{result.share_of_peak:.0%} of the measured {result.peak_flops_per_second / 1e9:.0f} GFLOP/s",
        f"time        {parts}",
    ]
    if result.plain_seconds is not None:
        equal = {None: "", True: ", tokens equal", False: ", TOKENS DIFFER"}[result.is_equal]
        lines.append(f"plain       {result.plain_seconds:.3f} s, engine {result.speedup:.2f} times as fast{equal}")
    return "\n".join(lines)
