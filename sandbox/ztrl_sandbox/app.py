"""The routes: ``/v1/execute``, SandboxFusion's ``/run_code``, health and metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Security
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ztrl_sandbox import __version__
from ztrl_sandbox.auth import BearerAuth
from ztrl_sandbox.metrics import Metrics
from ztrl_sandbox.pool import QueueFullError, WorkerPool
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Status
from ztrl_sandbox.schemas import (
    MAX_CODE_CHARACTERS,
    ExecuteAnswer,
    ExecuteBody,
    HealthAnswer,
    ReadyAnswer,
    Refusal,
    RunCodeAnswer,
    RunCodeBody,
    SessionAnswer,
    SessionBody,
    SessionExecuteAnswer,
    SessionExecuteBody,
    fusion_failure,
    fusion_shape,
    native_shape,
)
from ztrl_sandbox.sessions import SessionsBusyError, SessionTable, UnknownSessionError

MAX_BODY_BYTES = 64 << 20
_RESTART_SECONDS = 1
"""How long it may take until workers can be started again."""

_DESCRIPTION = """Runs Python that a language model wrote, each snippet in a fresh, isolated process.

Every answer tells the snippet's failures from the executor's: `rejected` and `sandbox_error` say nothing about
the snippet. A client that hangs up stops its snippet."""

Answers = dict[int | str, dict[str, Any]]

REFUSED: Answers = {413: {"model": ExecuteAnswer, "description": "The code or the whole body is too large."}}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds until a try is worth it.", "schema": {"type": "integer"}}
}
BUSY: Answers = {
    429: {"model": ExecuteAnswer, "description": "The queue is full; nothing ran.", "headers": _RETRY_AFTER}
}
_UNKNOWN_SESSION: Answers = {
    404: {"model": Refusal, "description": "No such session, or no longer; `detail` says which and why."}
}
_NO_SESSION_NOW: Answers = {
    429: {"model": Refusal, "description": "Every session is in use.", "headers": _RETRY_AFTER},
    503: {"model": Refusal, "description": "No worker can be started.", "headers": _RETRY_AFTER},
}
_UNAUTHORIZED: Answers = {401: {"model": Refusal, "description": "The bearer token is missing or wrong."}}


def create_app(pool: WorkerPool, sessions: SessionTable, metrics: Metrics, token: str | None) -> ASGIApp:
    """The application around what the caller starts and stops; ``token`` is asked for if given."""
    app = FastAPI(
        title="ztrl-sandbox", version=__version__, description=_DESCRIPTION, redoc_url=None, docs_url="/docs"
    )
    guarded: dict[str, Any] = {}
    if token is not None:
        # Documents the token; what asks for it is the middleware, which does so before a body is read.
        guarded = {"dependencies": [Security(HTTPBearer(auto_error=False))], "responses": _UNAUTHORIZED}
    _add_execution(app, pool, metrics, guarded)
    _add_sessions(app, sessions, metrics, guarded)
    _add_state(app, pool, sessions, metrics, guarded)
    app.add_exception_handler(_BodyTooLargeError, _refuse_body)
    app.add_exception_handler(UnknownSessionError, _refuse_session)
    limited = _BodyLimit(app)
    return limited if token is None else BearerAuth(limited, token)


def _add_execution(app: FastAPI, pool: WorkerPool, metrics: Metrics, guarded: dict[str, Any]) -> None:
    @app.post("/v1/execute", tags=["execution"], **with_answers(guarded, ExecuteAnswer, REFUSED, BUSY))
    async def execute(body: ExecuteBody, request: Request) -> Response:
        """Run one snippet in a fresh process and answer when it has ended."""
        return await answer(metrics, request, pool.execute, body.request(), native_shape)

    @app.post("/run_code", tags=["execution"], **with_answers(guarded, RunCodeAnswer, REFUSED, BUSY))
    async def run_code(body: RunCodeBody, request: Request) -> Response:
        """Run one snippet, in SandboxFusion's protocol."""
        if body.language != "python":
            return JSONResponse(fusion_failure(f"language {body.language!r} is not supported; use python"))
        try:
            execution = body.request()
        except ValueError as error:
            return JSONResponse(fusion_failure(str(error)))
        return await answer(metrics, request, pool.execute, execution, fusion_shape)


def _add_sessions(app: FastAPI, sessions: SessionTable, metrics: Metrics, guarded: dict[str, Any]) -> None:
    @app.post(
        "/v1/sessions",
        tags=["sessions"],
        status_code=201,
        **with_answers(guarded, SessionAnswer, _NO_SESSION_NOW),
    )
    async def open_session(body: SessionBody | None = None) -> Response:
        """Open a session: code that shares variables, call after call."""
        try:
            session = await sessions.open(**dict(body or SessionBody()))
        except SessionsBusyError as error:
            return _refusal(429, str(error), error.retry_after_seconds)
        except (OSError, RuntimeError, ValueError) as error:
            return _refusal(503, f"no session can be opened now: {error}", _RESTART_SECONDS)
        return JSONResponse(sessions.describe(session), status_code=201)

    @app.post(
        "/v1/sessions/{session_id}/execute",
        tags=["sessions"],
        **with_answers(guarded, SessionExecuteAnswer, REFUSED, BUSY, _UNKNOWN_SESSION),
    )
    async def execute_in_session(session_id: str, body: SessionExecuteBody, request: Request) -> Response:
        """Run code where the session's earlier code ran. Calls of one session run in their order of arrival.

        Code that does not end in time is interrupted (`KeyboardInterrupt`); the session dies only if it does
        not stop at that. The same happens when the client hangs up.
        """

        def run(execution: ExecutionRequest) -> Coroutine[None, None, ExecutionResult]:
            return sessions.execute(session_id, execution)

        def shape(result: ExecutionResult) -> dict[str, Any]:
            return {**native_shape(result), "session_alive": sessions.alive(session_id)}

        return await answer(metrics, request, run, body.request(), shape, in_session=True)

    @app.get(
        "/v1/sessions/{session_id}",
        tags=["sessions"],
        **with_answers(guarded, SessionAnswer, _UNKNOWN_SESSION),
    )
    async def describe_session(session_id: str) -> Response:
        """What the session has used so far. Does not count as use."""
        return JSONResponse(sessions.describe(sessions.find(session_id)))

    @app.delete(
        "/v1/sessions/{session_id}",
        tags=["sessions"],
        status_code=204,
        **with_answers(guarded, None, _UNKNOWN_SESSION),
    )
    async def delete_session(session_id: str) -> Response:
        """End the session and what runs in it."""
        sessions.delete(session_id)
        return Response(status_code=204)


def _add_state(
    app: FastAPI, pool: WorkerPool, sessions: SessionTable, metrics: Metrics, guarded: dict[str, Any]
) -> None:
    @app.get("/health", tags=["state"], response_model=HealthAnswer)
    async def health() -> Response:
        """Isolation in force, limits, workers. Needs no token."""
        return JSONResponse(
            {**_health(pool), "sessions": len(sessions), "max_sessions": sessions.config.max_sessions}
        )

    @app.get(
        "/ready",
        tags=["state"],
        response_model=ReadyAnswer,
        responses={503: {"model": ReadyAnswer, "description": "No worker is up."}},
    )
    async def ready() -> Response:
        """Whether a snippet could start now. Needs no token."""
        live = len(pool.worker_pids)
        return JSONResponse({"ready": live > 0, "workers": live}, status_code=200 if live else 503)

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse, **guarded)
    async def prometheus() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _health(pool: WorkerPool) -> dict[str, Any]:
    return {
        "status": "ok",
        "version": __version__,
        "python": platform.python_version(),
        "isolation": pool.tier.name,
        "isolation_reason": pool.tier.reason,
        "isolation_layers": pool.isolation_layers,
        "preload": list(pool.config.preload),
        "limits": dataclasses.asdict(pool.config.limits),
        "workers": pool.config.workers,
        "worker_pids": pool.worker_pids,
        "zygote_pid": pool.zygote_pid,
        "worker_restarts": pool.restarts,
        "workers_recycled": pool.recycled,
        "queued": pool.queued,
    }


def with_answers(guarded: dict[str, Any], model: Any, *others: Answers) -> dict[str, Any]:
    """Keyword arguments of a route that answers 200 with ``model``, or one of ``others``."""
    responses: Answers = dict(guarded.get("responses", {}))
    for other in others:
        responses |= other
    return {**guarded, "response_model": model, "responses": responses}


async def answer(
    metrics: Metrics,
    request: Request,
    run: Callable[[ExecutionRequest], Coroutine[None, None, ExecutionResult]],
    execution: ExecutionRequest,
    shape: Callable[[ExecutionResult], dict[str, Any]],
    *,
    in_session: bool = False,
) -> Response:
    """Run it and answer; 429 when the queue is full, 413 when the code is too large."""
    status_code, headers = 200, {}
    result: ExecutionResult | None
    if len(execution.code) > MAX_CODE_CHARACTERS:
        message = f"the code has {len(execution.code)} characters; at most {MAX_CODE_CHARACTERS} are accepted"
        status_code, result = 413, ExecutionResult(status=Status.REJECTED, message=message)
    else:
        try:
            result = await _unless_disconnected(request, run(execution))
        except QueueFullError as error:
            status_code, headers = 429, {"Retry-After": str(error.retry_after_seconds)}
            result = ExecutionResult(status=Status.REJECTED, message=str(error))
    if result is None:
        return Response(status_code=499)  # nobody reads it
    metrics.observe(result, in_session=in_session)
    return JSONResponse(shape(result), status_code=status_code, headers=headers)


def _refusal(status_code: int, detail: str, retry_after_seconds: int | None = None) -> Response:
    headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return JSONResponse({"detail": detail}, status_code=status_code, headers=headers)


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


class _BodyTooLargeError(HTTPException):
    def __init__(self) -> None:
        super().__init__(413, f"the request has more than {MAX_BODY_BYTES} bytes")


async def _refuse_session(request: Request, error: Exception) -> Response:
    return _refusal(404, str(error))


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, _BodyTooLargeError)
    result = ExecutionResult(status=Status.REJECTED, message=error.detail)
    return JSONResponse(native_shape(result), status_code=413)


class _BodyLimit:
    """ASGI middleware that stops reading a request which is larger than any sensible one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received_bytes = 0

        async def receive_limited() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > MAX_BODY_BYTES:
                raise _BodyTooLargeError
            return message

        await self._app(scope, receive_limited, send)
