"""The server process: admits, binds, starts the pool, serves HTTP, stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ztrl_sandbox import linux
from ztrl_sandbox.app import create_app
from ztrl_sandbox.auth import check_bind
from ztrl_sandbox.metrics import Metrics
from ztrl_sandbox.pool import PoolConfig, WorkerPool
from ztrl_sandbox.sessions import SessionConfig, SessionTable

_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections, so that none sends into a closing one."""
_ANSWER_SECONDS = 10
"""How long a server that stops waits until the callers of what it has stopped have their answers."""


class JoinedWrites:
    """A transport that sends what is written to it in one turn of the event loop at once, at the turn's end.

    uvicorn writes the head and the body of an answer one after the other; sending them together saves a system call
    here and the client a second awakening.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it soon."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        """Send what was written and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._written:
            self._transport.write(b"".join(self._written))
            self._written.clear()


class _Protocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # a class that uvicorn chooses when imported
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(JoinedWrites(transport))


class _Server(uvicorn.Server):
    """uvicorn that stops the workers first, so that running calls are answered and the stop is prompt."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_ready: Callable[[], None],
        stop_workers: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._stop_workers = stop_workers

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are :func:`serve`'s, which exits with 0 after a clean stop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._stop_workers()
        await super().shutdown(sockets)


async def serve(
    host: str,
    port: int,
    config: PoolConfig,
    session_config: SessionConfig,
    *,
    token: str | None = None,
    exit_with_parent: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; print one JSON line on standard output when ready.

    Args:
        host: Address to bind; anything but loopback needs a token.
        port: 0 takes a free one; the ready line says which.
        config: Workers, preload set, limits.
        session_config: Caps on sessions.
        token: Bearer token that callers must send.
        exit_with_parent: Also stop when the process that started this one ends, however it ends.

    Raises:
        ValueError: the configuration cannot be satisfied on this machine, or is not safe.
        OSError: the address cannot be bound.
    """
    check_bind(host, token)
    # A snippet that shares our uid must not read the token out of our memory or environment.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    loop = asyncio.get_running_loop()
    parent = os.pidfd_open(os.getppid()) if exit_with_parent else None
    listener = _listen(host, port)
    pool = WorkerPool(config)
    metrics = Metrics(pool)
    sessions = SessionTable(pool, session_config, metrics)
    await pool.start()

    uvicorn_config = uvicorn.Config(
        create_app(pool, sessions, metrics, token),
        http=_Protocol,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        lifespan="off",
        timeout_graceful_shutdown=_ANSWER_SECONDS,
    )

    async def stop_workers() -> None:
        sessions.stop()
        await pool.stop()

    server = _Server(uvicorn_config, lambda: _announce(listener), stop_workers)

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if parent is not None:
        loop.add_reader(parent, stop)
    await server.serve(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=4096)
    # A large answer goes out in parts; without this (accepted sockets inherit it) each waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _announce(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(json.dumps({"event": "ready", "url": url, "port": port, "pid": os.getpid()}), flush=True)
