"""What HTTP costs a driver, which the simulation leaves out: measured with the real client on loopback."""

from __future__ import annotations

import asyncio
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

from aiohttp import web

from megatron_ztrl.engines.client import EngineClient

_CALLS, _AT_ONCE = 400, 32


def http_seconds_per_call(request_bytes: int, reply_bytes: int) -> float:
    """Processor seconds of one call, all on the client's side, without JSON."""
    context = get_context("spawn")
    port_here, port_there = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(port_there, reply_bytes), daemon=True)
    server.start()
    try:
        return asyncio.run(_measure(port_here.recv(), b"x" * request_bytes))
    finally:
        server.terminate()
        server.join()


async def _measure(port: int, request: bytes) -> float:
    async with EngineClient(f"http://127.0.0.1:{port}", request_timeout_seconds=60.0) as client:

        async def call_in_turn(calls: int) -> None:
            for _ in range(calls):
                await client._request("POST", "/generate", request)

        await asyncio.gather(*(call_in_turn(2) for _ in range(_AT_ONCE)))  # opens the connections
        began = time.process_time()
        await asyncio.gather(*(call_in_turn(_CALLS // _AT_ONCE) for _ in range(_AT_ONCE)))
        return (time.process_time() - began) / (_CALLS // _AT_ONCE * _AT_ONCE)


def _serve(port: Connection, reply_bytes: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"x" * reply_bytes)  # no JSON: the client parses nothing

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/generate", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())
