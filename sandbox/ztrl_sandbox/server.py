"""The HTTP face of the pool: ``/v1/execute``, SandboxFusion's ``/run_code``, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from ztrl_sandbox import __version__
from ztrl_sandbox.metrics import Metrics
from ztrl_sandbox.pool import PoolConfig, QueueFullError, WorkerPool
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Status

MAX_RUN_TIMEOUT_SECONDS = 600.0
MAX_CODE_CHARACTERS = 1 << 20


class ExecuteBody(BaseModel):
    """``POST /v1/execute``; the fields are those of :class:`ExecutionRequest`."""

    model_config = ConfigDict(extra="forbid")

    code: str
    run_timeout_seconds: float = Field(default=20.0, gt=0, le=MAX_RUN_TIMEOUT_SECONDS)
    stdin: str | None = None
    memory_limit_bytes: int | None = Field(default=None, gt=0)
    print_last_expression: bool = False


class RunCodeBody(BaseModel):
    """``POST /run_code``: SandboxFusion's request; its fields that mean nothing for Python are ignored."""

    code: str
    language: str = "python"
    run_timeout: float = Field(default=10.0, gt=0, le=MAX_RUN_TIMEOUT_SECONDS)
    stdin: str | None = None
    memory_limit_MB: int = -1
    files: dict[str, str | None] = Field(default_factory=dict)
    fetch_files: list[str] = Field(default_factory=list)


def create_app(pool: WorkerPool) -> FastAPI:
    """The application around a pool that the caller starts and stops."""
    app = FastAPI(title="ztrl-sandbox", version=__version__)
    metrics = Metrics(pool)

    @app.post("/v1/execute")
    async def execute(body: ExecuteBody, request: Request) -> Response:
        return await _answer(pool, metrics, request, ExecutionRequest(**dict(body)), _native_shape)

    @app.post("/run_code")
    async def run_code(body: RunCodeBody, request: Request) -> Response:
        if body.language != "python":
            return JSONResponse(_fusion_failure(f"language {body.language!r} is not supported; use python"))
        if body.files or body.fetch_files:
            return JSONResponse(_fusion_failure("files and fetch_files are not supported"))
        execution = ExecutionRequest(
            code=body.code,
            run_timeout_seconds=body.run_timeout,
            stdin=body.stdin,
            memory_limit_bytes=body.memory_limit_MB << 20 if body.memory_limit_MB > 0 else None,
        )
        return await _answer(pool, metrics, request, execution, _fusion_shape)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "version": __version__,
            "python": platform.python_version(),
            "isolation": pool.isolation,
            "isolation_reason": pool.isolation_reason,
            "preload": list(pool.config.preload),
            "limits": dataclasses.asdict(pool.config.limits),
            "workers": pool.config.workers,
            "worker_pids": pool.worker_pids,
            "zygote_pid": pool.zygote_pid,
            "worker_restarts": pool.restarts,
            "queued": pool.queued,
        }

    @app.get("/ready")
    async def ready() -> Response:
        live = len(pool.worker_pids)
        return JSONResponse({"ready": live > 0, "workers": live}, status_code=200 if live else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _answer(
    pool: WorkerPool,
    metrics: Metrics,
    request: Request,
    execution: ExecutionRequest,
    shape: Callable[[ExecutionResult], dict[str, Any]],
) -> Response:
    """Run it and answer; 429 when the queue is full, 413 when the code is too large."""
    status_code, headers = 200, {}
    result: ExecutionResult | None
    if len(execution.code) > MAX_CODE_CHARACTERS:
        message = f"the code has {len(execution.code)} characters; at most {MAX_CODE_CHARACTERS} are accepted"
        status_code, result = 413, ExecutionResult(status=Status.REJECTED, message=message)
    else:
        try:
            result = await _unless_disconnected(request, pool.execute(execution))
        except QueueFullError as error:
            status_code, headers = 429, {"Retry-After": str(error.retry_after_seconds)}
            result = ExecutionResult(status=Status.REJECTED, message=str(error))
    if result is None:
        return Response(status_code=499)  # nobody reads it
    metrics.observe(result)
    return JSONResponse(shape(result), status_code=status_code, headers=headers)


async def _unless_disconnected(
    request: Request, work: Coroutine[None, None, ExecutionResult]
) -> ExecutionResult | None:
    """``work``'s result; None, with ``work`` cancelled, when the client hangs up first."""
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(request.receive())  # the body is read: only a disconnect can come
    try:
        await asyncio.wait((working, hanging_up), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        hanging_up.cancel()


def _native_shape(result: ExecutionResult) -> dict[str, Any]:
    return dataclasses.asdict(result)


def _fusion_failure(message: str) -> dict[str, Any]:
    return {
        "status": "SandboxError",
        "message": message,
        "compile_result": None,
        "run_result": None,
        "executor_pod_name": None,
        "files": {},
    }


def _fusion_shape(result: ExecutionResult) -> dict[str, Any]:
    """SandboxFusion has fewer statuses: what it lacks is told by the return code and the standard error."""
    if result.status.is_infrastructure:
        return _fusion_failure(result.message)
    timed_out = result.status is Status.TIMEOUT
    return {
        **_fusion_failure(""),
        "status": "Success" if result.exit_code == 0 else "Failed",
        "run_result": {
            "status": "TimeLimitExceeded" if timed_out else "Finished",
            "execution_time": result.run_seconds,
            "return_code": None if timed_out else result.exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        },
    }


class _Server(uvicorn.Server):
    """uvicorn that stops the pool first, so that running calls are answered and the stop is prompt."""

    def __init__(self, config: uvicorn.Config, pool: WorkerPool, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._pool = pool
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are :func:`serve`'s, which exits with 0 after a clean stop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._pool.stop()
        await super().shutdown(sockets)


async def serve(host: str, port: int, config: PoolConfig, *, exit_with_parent: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; print one JSON line on standard output when ready.

    Args:
        host: Address to bind; anything but loopback lets others run code on this machine.
        port: 0 takes a free one; the ready line says which.
        config: Workers, preload set, limits.
        exit_with_parent: Also stop when the process that started this one ends, however it ends.

    Raises:
        ValueError: the configuration cannot be satisfied on this machine.
        OSError: the address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    parent = os.pidfd_open(os.getppid()) if exit_with_parent else None
    listener = socket.create_server((host, port), backlog=4096)
    # Answers go out in two parts; without this (accepted sockets inherit it) each waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pool = WorkerPool(config)
    await pool.start()

    def announce() -> None:
        bound_host, bound_port = listener.getsockname()[:2]
        url = f"http://{bound_host}:{bound_port}"
        line = {"event": "ready", "url": url, "port": bound_port, "pid": os.getpid()}
        print(json.dumps(line), flush=True)

    uvicorn_config = uvicorn.Config(
        create_app(pool), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    server = _Server(uvicorn_config, pool, announce)

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if parent is not None:
        loop.add_reader(parent, stop)
    await server.serve(sockets=[listener])
