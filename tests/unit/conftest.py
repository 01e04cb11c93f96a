"""Scripted executors: real HTTP servers on loopback that answer what a test tells them to."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

Step = dict[str, Any] | tuple[int, dict[str, Any], dict[str, str]] | str | Callable[[], Awaitable[dict]]
"""What to do with one request: answer 200 with this object, or with this status, object and headers;
"hang up"; "hang" until the client hangs up; or answer 200 with what this coroutine returns."""


class ScriptedExecutor:
    """Follows its script, one step per request; the last step is for all that come after."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.requests: list[web.Request] = []
        self.bodies: list[Any] = []
        self.ready = True
        self.probes = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.abandoned = asyncio.Event()
        """A client has closed its connection before the answer."""
        self._arrived = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def calls(self) -> list[str]:
        return [f"{request.method} {request.path}" for request in self.requests]

    async def start(self) -> "ScriptedExecutor":
        """Again on the same port after a stop."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/ready", self._ready)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        """Connections break and new ones are refused."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections):
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def received(self, count: int) -> None:
        """Wait until so many requests have come."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.bodies) >= count)

    async def _ready(self, request: web.Request) -> web.Response:
        self.probes += 1
        return web.json_response({"ready": self.ready}, status=200 if self.ready else 503)

    async def _handle(self, request: web.Request) -> web.Response:
        step = self.script[min(len(self.requests), len(self.script) - 1)]
        self.requests.append(request)
        self.bodies.append(await request.json() if request.can_read_body else None)
        async with self._arrived:
            self._arrived.notify_all()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._follow(step, request)
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        finally:
            self.in_flight -= 1

    async def _follow(self, step: Step, request: web.Request) -> web.Response:
        if step == "hang":
            await asyncio.Event().wait()
        if step == "hang up":
            request.transport.abort()
            return web.Response()
        if callable(step):
            step = await step()
        if isinstance(step, tuple):
            status, payload, headers = step
            return web.json_response(payload, status=status, headers=headers)
        return web.json_response(step)


@pytest.fixture
async def scripted():
    """Starts scripted executors: ``await scripted(step, step, ...)``."""
    started = []

    async def start(*script: Step) -> ScriptedExecutor:
        executor = await ScriptedExecutor(*script).start()
        started.append(executor)
        return executor

    yield start
    for executor in started:
        await executor.stop()
