"""The verb `dare rollout-server`; like those of `dare.cli`, its body imports what it needs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dare.cli_options import Checkpoint, DecodeOptions, Device, Dtype, find_place
from dare.core.errors import DareError, unknown_name


def rollout_server(
    checkpoint: Checkpoint,
    overrides: DecodeOptions = None,
    *,
    contract: Annotated[str, typer.Option(help="whose HTTP contract it speaks: sglang or lmdeploy")] = "sglang",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 30000,
    api_key_env: Annotated[str | None, typer.Option(help="variable that holds the key requests have to bring")] = None,
    device: Device = "auto",
    dtype: Dtype = "checkpoint",
) -> None:
    """Rollout server: a block model behind the HTTP contract of SGLang or LMDeploy, for recipes with a rollout section.

    The decode options are those that a request does not carry: unmask, steps_per_block, threshold, block_length. Give
    the recipe's. On an address that other machines reach, an API key is required.

    \b
    Examples:
      dare rollout-server runs/sdar/sft block_length=4 steps_per_block=1 unmask=max_prob
      dare rollout-server runs/sdar/sft --contract lmdeploy --port 23333 --dtype bfloat16
    """
    from dare.core.rollout_recipe import is_loopback

    if contract not in ("sglang", "lmdeploy"):
        raise unknown_name("contract", contract, ("sglang", "lmdeploy"), where="--contract")
    key = None if api_key_env is None else os.environ.get(api_key_env)
    address = f"[{host}]" if ":" in host else host
    if api_key_env is not None and not key:
        raise DareError("the API key is not set", where="--api-key-env", fix=f"export {api_key_env}=KEY")
    if key is None and not is_loopback(f"http://{address}"):
        raise DareError(
            "other machines reach this address", where="--host", got=host, fix="give --api-key-env, or leave --host out"
        )
    place, wanted = find_place(device, dtype)
    try:
        from dare.remote.run import serve
    except ImportError as error:
        raise DareError(
            "the rollout server needs FastAPI and uvicorn", got=str(error), fix="pip install 'dare-dllm[serve]'"
        ) from None
    from pydantic import ValidationError

    from dare.core.decode import Decode
    from dare.core.recipe_errors import explain
    from dare.terminal.settings import parse_options

    try:
        decode = Decode.model_validate(parse_options(overrides or []))
    except ValidationError as error:
        raise explain(error, Decode, where="rollout-server", what="the decode options are") from None
    serve(checkpoint, decode, contract=contract, address=(host, port), api_key=key, place=place, dtype=wanted)
