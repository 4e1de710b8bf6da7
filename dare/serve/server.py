"""Sockets, signals and the way out: `run_server` returns when everybody has been answered."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dare.core.errors import DareError
from dare.serve.app import make_app
from dare.serve.guard import Guard, log
from dare.serve.service import Service

_BACKLOG = 2048
_KEEP_ALIVE_S = 30
_SILENCE_MS = 60_000
_CLOSE_S = 5  # for answers that are on their way when all work is done


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises DareError if the address cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit this: the system notices clients that have gone without a word.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # and those that never take what has been sent
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        raise DareError(
            "cannot serve here", where=f"{host}:{port}", got=str(error), fix="choose another --host or --port"
        ) from None
    return opened


def check_host(host: str, keys: Sequence[str]) -> None:
    """Raise DareError for an address that others reach, without a key."""
    if not keys and not is_loopback(host):
        raise DareError(
            "others reach this address, so an API key is required",
            where="--host",
            got=host,
            fix="give --api-key-file or --api-key-env, or use --host 127.0.0.1",
        )


def guarded_app(service: Service, host: str, keys: Sequence[str]) -> Guard:
    """The application as it is served on an address that `check_host` has passed."""
    names = None if keys else {host, f"[{host}]", "localhost", "127.0.0.1", "[::1]"}
    return Guard(make_app(service), service.limits, service.metrics, keys=keys, hosts=names)


def start_log(*, is_quiet: bool) -> None:
    """A line per answer on stderr, or warnings only."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    log.setLevel(logging.WARNING if is_quiet else logging.INFO)


def run_server(service: Service, opened: socket.socket, app: Guard, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then answer who is waiting, for at most `drain_s`; a second signal stops at once.

    Raises what ended the engine, if something did.
    """
    asyncio.run(serve(service, opened, app, on_ready))
    if service.scheduler.fault is not None:
        raise service.scheduler.fault


async def serve(
    service: Service,
    opened: socket.socket,
    app: Guard,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until a signal or `stop`; see `run_server`."""
    server = _Server(_config(service, app))
    stop, hurry = stop or asyncio.Event(), asyncio.Event()
    with _signals(stop, hurry):
        service.scheduler.start()
        serving = asyncio.create_task(server.serve([opened]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if on_ready is not None:
            on_ready()
        await _until_stopped(service, serving, stop)
        service.scheduler.drain()
        await _until_idle(service, hurry)
        await asyncio.to_thread(service.scheduler.stop)
        server.should_exit = True
        await serving  # what the engine has finished still becomes text
        await asyncio.to_thread(service.close)


async def _until_stopped(service: Service, serving: asyncio.Task[None], stop: asyncio.Event) -> None:
    while not (stop.is_set() or serving.done() or service.scheduler.fault):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.2)


async def _until_idle(service: Service, hurry: asyncio.Event) -> None:
    """Until nothing is left to do, time is up, or a second signal came."""
    loop = asyncio.get_running_loop()
    end = loop.time() + service.limits.drain_s
    while not service.scheduler.is_idle and not hurry.is_set() and loop.time() < end:
        await asyncio.sleep(0.02)


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first signal asks to stop, the second to hurry. Elsewhere than in the main thread nothing is handled."""
    loop, handled = asyncio.get_running_loop(), []

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
            handled.append(number)
    except (RuntimeError, ValueError):  # not the main thread
        pass
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _config(service: Service, app: Guard) -> uvicorn.Config:
    class Protocol(_Protocol):
        head_timeout_s = service.limits.read_timeout_s

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_S,
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


class _Protocol(H11Protocol):
    """uvicorn's protocol, with a time limit for the head of a request and a way to drop a connection."""

    head_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._head_timer = self.loop.call_later(self.head_timeout_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
