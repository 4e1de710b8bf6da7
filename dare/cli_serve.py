"""The verb `dare serve`; its body imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare.cli_options import Base, Checkpoint, DecodeOptions, Device, Dtype, load_model
from dare.core.errors import DareError


def serve(
    checkpoint: Checkpoint,
    overrides: DecodeOptions = None,
    *,
    host: Annotated[str, typer.Option(help="address; others than loopback need an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="file with API keys, one a line")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="environment variable that holds an API key")] = None,
    name: Annotated[str | None, typer.Option(help="name of the model; default: that of the checkpoint")] = None,
    seats: Annotated[int, typer.Option(min=1, help="completions denoised together")] = 32,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="such as max_tokens=512; repeatable")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no line per request")] = False,
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = "checkpoint",
) -> None:
    """Serve a model over HTTP: completions, chat and log-likelihoods, in the shape of the OpenAI API.

    Without options, a checkpoint of a run decodes as that run is evaluated. Ctrl-C or SIGTERM lets running requests
    finish; a second one does not. Limits: max_body_bytes, max_prompt_tokens, max_tokens, max_choices, max_items,
    max_samples, max_requests, max_queue, timeout_s, read_timeout_s, write_timeout_s, drain_s.

    \b
    Examples:
      dare serve runs/rl
      dare serve GSAI-ML/LLaDA-8B-Instruct block_length=32 eos_stop=true --port 8001 --limit max_tokens=512
      dare serve runs/rl --host 0.0.0.0 --api-key-file keys.txt
      curl 127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "3 5 7>22="}'
    """
    try:
        from dare.serve.server import check_host, guarded_app, open_socket, run_server, start_log
    except ModuleNotFoundError as error:
        raise DareError("the server is not installed", got=str(error), fix="pip install 'dare-dllm[serve]'") from None
    from dare.serve.keys import read_keys
    from dare.serve.limits import read_limits
    from dare.serve.service import Service, read_decode
    from dare.terminal.settings import generation_options, parse_options

    keys = read_keys(api_key_file, api_key_env)
    check_host(host, keys)
    limits = read_limits(parse_options(limit or []))
    defaults = generation_options(checkpoint, overrides or [])
    read_decode(defaults)
    opened = open_socket(host, port)
    model = load_model(checkpoint, device, dtype, base)
    name = name or Path(checkpoint).resolve().name
    service = Service(model, name=name, limits=limits, num_seats=seats, defaults=defaults)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{opened.getsockname()[1]}"
    start_log(is_quiet=quiet)
    run_server(
        service, opened, guarded_app(service, host, keys), lambda: typer.echo(f"{name}: {address}  (Ctrl-C ends it)")
    )
    typer.echo("ended")
