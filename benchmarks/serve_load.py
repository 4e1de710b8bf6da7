"""200 clients at once against `dare serve`: nothing lost, nothing doubled, how long they wait.

python benchmarks/serve_load.py [--clients 200] [--requests 5] [--family sdar] [--seats 32]

Every client sends its requests one after another; a third of them stream, one in ten also leaves in the middle of a
request. Each answer is held against the one that the engine gives in this process. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.diffusion.trace import to_completions
from dare.families.tokenizer import char_tokenizer
from dare.families.weights import create_family
from dare.model import Model, load
from dare.rollout.engine import denoise

ALPHABET = "0123456789+-*=> "
_PATIENCE_S = 60.0
DECODE: dict[str, Any] = {"gen_length": 16, "block_length": 4, "temperature": 1.0}


class Result(NamedTuple):
    number: int
    tokens: list[int]
    seconds: float
    first_s: float | None  # until the first text, of a stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=5, help="of each client")
    parser.add_argument("--family", default="sdar")
    parser.add_argument("--seats", type=int, default=32)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = _make_model(Path(folder) / "tiny", options.family)
        started = time.perf_counter()
        server, port = _start(path, options.seats)
        print(f"the server was up after {time.perf_counter() - started:.0f} s", flush=True)
        try:
            started, cpu_before = time.perf_counter(), _cpu_seconds(server.pid)
            results = asyncio.run(_all_clients(port, options.clients, options.requests))
            seconds, cpu = time.perf_counter() - started, _cpu_seconds(server.pid) - cpu_before
            state = asyncio.run(_idle_state(port))
        finally:
            server.terminate()
            exit_code = server.wait(60)
        model = load(path)
    expected = _expected(model, options.clients * options.requests)
    num_wrong = sum(result.tokens != expected[result.number] for result in results)
    numbers = [result.number for result in results]
    print(f"{options.family}, {options.clients} clients x {options.requests} requests, {options.seats} seats, "
          f"{os.cpu_count()} cores, load before {load_before:.1f}")  # fmt: skip
    print(f"answered {len(numbers)} of {len(expected)}, doubled {len(numbers) - len(set(numbers))}, wrong {num_wrong}, "
          f"left over {state}, exit code {exit_code}")  # fmt: skip
    num_tokens = sum(len(result.tokens) for result in results)
    print(f"{seconds:.1f} s, {len(results) / seconds:.0f} requests/s, {num_tokens / seconds:.0f} tokens/s")
    print(f"server CPU   {cpu:.1f} s, {1000 * cpu / len(results):.1f} ms a request, {num_tokens / cpu:.0f} tokens/s")
    print(f"latency      {_percentiles([result.seconds for result in results])}")
    print(f"first text   {_percentiles([result.first_s for result in results if result.first_s is not None])}")
    sys.exit(bool(num_wrong or len(set(numbers)) != len(expected) or exit_code))


def _make_model(path: Path, family: str) -> Path:
    tokenizer = char_tokenizer(ALPHABET)
    made = create_family(
        family, vocab_size=len(tokenizer), hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=128,
        max_length=128, block_length=4, tie_embeddings=False, mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, seed=0,
    )  # fmt: skip
    Model(made, tokenizer).save(path)
    return path


def _start(path: Path, seats: int) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "dare.cli", "serve", str(path), "--port", "0", "--quiet", "--seats", str(seats)]
    options = [f"{key}={value}" for key, value in DECODE.items()]
    server = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    return server, int(line.split("127.0.0.1:")[1].split()[0])


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _prompt(number: int) -> str:
    return f"{number}+{7 * number % 100}="


async def _all_clients(port: int, num_clients: int, num_requests: int) -> list[Result]:
    clients = [_client(port, index, num_clients, num_requests) for index in range(num_clients)]
    return [result for results in await asyncio.gather(*clients) for result in results]


async def _client(port: int, index: int, num_clients: int, num_requests: int) -> list[Result]:
    results = []
    for request in range(num_requests):
        number = request * num_clients + index
        if request == 1 and index % 10 == 0:
            await _leave(port, number)
        async with asyncio.timeout(_PATIENCE_S):
            results.append(await _complete(port, number, is_stream=index % 3 == 0))
    return results


def _request(number: int, *, is_stream: bool) -> bytes:
    body = {
        "prompt": _prompt(number),
        "stream": is_stream,
        "seed": 1,
        "dare": {"sample_ids": [number], "details": True},
    }
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def _complete(port: int, number: int, *, is_stream: bool) -> Result:
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(number, is_stream=is_stream))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise SystemExit(f"request {number}: {head!r} {await reader.read()!r}")
    first_s = None
    if is_stream:
        lines = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                first_s = first_s or time.perf_counter() - started
                lines.append(json.loads(line[6:]))
        choice = lines[-1]["choices"][0]
    else:
        choice = json.loads(await reader.read())["choices"][0]
    writer.close()
    return Result(number, choice["dare"]["token_ids"], time.perf_counter() - started, first_s)


async def _leave(port: int, number: int) -> None:
    """Ask, and go without waiting for the answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(number, is_stream=True))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def _idle_state(port: int) -> str:
    """Rows that wait or run when all clients are gone, at the latest after a second."""
    for _ in range(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        found = [
            line.split()[1] for line in text.split("\n") if line.startswith(("dare_rows_seated ", "dare_rows_wait"))
        ]
        if found == ["0.0", "0.0"]:
            return "nothing"
        await asyncio.sleep(0.1)
    return f"{found} rows"


def _expected(model: Model, num: int) -> list[list[int]]:
    prompts = [model.encode(_prompt(number)) for number in range(num)]
    trace = denoise(model.family, prompts, Decode(**DECODE), Key(1).fold("generate"), list(range(num)))
    return [completion.tokens for completion in to_completions(trace)]


def _percentiles(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return "  ".join(f"p{q} {1000 * cuts[q - 1]:.0f} ms" for q in (50, 90, 99)) + f"  max {1000 * max(seconds):.0f} ms"


if __name__ == "__main__":
    main()
