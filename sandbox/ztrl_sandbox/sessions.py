"""Sessions: workers of their own, whose variables persist from call to call until they end.

A session is known by an unguessable id. Its calls run one after the other; calls of different sessions run at
once, as many as the pool has workers. It ends when it is deleted, unused for too long, evicted for a newer one,
over a cap, or when its process dies; then its state is gone and the table remembers why.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ztrl_sandbox.handles import Call, WorkerHandle
from ztrl_sandbox.pool import QueueFullError, WorkerPool
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult

if TYPE_CHECKING:
    from ztrl_sandbox.metrics import Metrics

_REMEMBERED_ENDS = 16384
"""Ended sessions of which the reason is still known."""
_RETRY_AFTER_SECONDS = 1
_DIED = "its process died"


class End(enum.StrEnum):
    """Why a session ended; the label of the metric."""

    DELETED = "deleted"
    EXPIRED = "expired"
    EVICTED = "evicted"
    EXHAUSTED = "exhausted"
    LOST = "lost"
    STOPPED = "stopped"


class UnknownSessionError(Exception):
    """There is no such session, or no longer; the text says which."""


class SessionsBusyError(Exception):
    """Every session is in use; try again after ``retry_after_seconds``."""

    def __init__(self, max_sessions: int) -> None:
        super().__init__(f"all {max_sessions} sessions are in use, retry after {_RETRY_AFTER_SECONDS} s")
        self.retry_after_seconds = _RETRY_AFTER_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """Caps on sessions."""

    max_sessions: int = 64
    """Open at once; beyond it the one that was unused for longest is evicted."""
    ttl_seconds: float = 600.0
    """Time without a call after which a session ends, unless it was opened with another."""
    max_calls: int = 10_000
    """Calls of one session."""
    max_run_seconds: float = 3600.0
    """Run time of one session, all its calls together."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"sessions.{name} must be positive, got {getattr(self, name)}")


@dataclass(eq=False, kw_only=True, slots=True)
class Session:
    """One session."""

    worker: WorkerHandle
    ttl_seconds: float
    memory_limit_bytes: int
    id: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    calls: int = 0
    run_seconds: float = 0.0
    pending: int = 0
    """Calls that run or wait."""
    end: str = ""
    """Why it ended; empty while it lives."""
    used_at: float = field(default_factory=time.monotonic)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    expiry: asyncio.TimerHandle | None = None


class SessionTable:
    """The sessions of one server."""

    def __init__(self, pool: WorkerPool, config: SessionConfig, metrics: Metrics) -> None:
        self.config = config
        self._pool = pool
        self._metrics = metrics
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        """By id, the one used last at the end."""
        self._opening = 0
        self._ends: OrderedDict[str, str] = OrderedDict()
        self._permits = asyncio.Semaphore(pool.config.workers)
        self._queued = 0
        self._watchers: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    async def open(
        self, *, ttl_seconds: float | None = None, memory_limit_bytes: int | None = None
    ) -> Session:
        """A new session; the idle one that was unused for longest makes room if it must.

        Raises:
            SessionsBusyError: none is idle.
            OSError, RuntimeError, ValueError: no worker can be started now.
        """
        self._make_room()
        self._opening += 1
        try:
            worker = await self._pool.lease()
        finally:
            self._opening -= 1
        server_limit_bytes = self._pool.config.limits.memory_bytes
        session = Session(
            worker=worker,
            ttl_seconds=ttl_seconds or self.config.ttl_seconds,
            memory_limit_bytes=min(memory_limit_bytes or server_limit_bytes, server_limit_bytes),
        )
        self._sessions[session.id] = session
        self._metrics.session_opened()
        self._await_expiry(session)
        watcher = asyncio.create_task(self._watch(session))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return session

    def find(self, session_id: str) -> Session:
        """The live session of this id.

        Raises:
            UnknownSessionError: there is none.
        """
        session = self._sessions.get(session_id)
        if session is not None:
            return session
        end = self._ends.get(session_id)
        if end is not None:
            raise UnknownSessionError(f"the session has ended and its state is lost: {end}")
        raise UnknownSessionError("unknown session: it was never opened on this server, or ended long ago")

    def alive(self, session_id: str) -> bool:
        """Whether the session can take another call."""
        return session_id in self._sessions

    def delete(self, session_id: str) -> None:
        """End it, whatever it does.

        Raises:
            UnknownSessionError: there is none.
        """
        self._end(self.find(session_id), End.DELETED, "it was deleted")

    def stop(self) -> None:
        """End all."""
        for session in list(self._sessions.values()):
            self._end(session, End.STOPPED, "the executor is stopping")

    def describe(self, session: Session) -> dict[str, Any]:
        """What callers are told of it."""
        return {
            "session_id": session.id,
            "state": "busy" if session.pending else "idle",
            "pending_calls": session.pending,
            "ttl_seconds": session.ttl_seconds,
            "idle_seconds": 0.0 if session.pending else time.monotonic() - session.used_at,
            "memory_limit_bytes": session.memory_limit_bytes,
            "calls": session.calls,
            "max_calls": self.config.max_calls,
            "run_seconds": session.run_seconds,
            "max_run_seconds": self.config.max_run_seconds,
        }

    async def execute(self, session_id: str, request: ExecutionRequest) -> ExecutionResult:
        """Run code where the calls before it ran. Cancelling the caller interrupts the code.

        Raises:
            UnknownSessionError: there is no such session, or it ended while the call waited for its turn.
            QueueFullError: too many calls wait already.
        """
        session = self.find(session_id)
        must_wait = session.turn.locked() or self._permits.locked()
        if must_wait and self._queued >= self._pool.config.queue_limit:
            raise QueueFullError(_RETRY_AFTER_SECONDS)
        self._begin_use(session)
        started: list[Call] = []
        running = asyncio.create_task(self._run(session, request, started))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # The session is busy until the worker reports, so what has started is not abandoned.
            if started:
                session.worker.cancel(started[0])
            else:
                running.cancel()
            raise

    async def _run(self, session: Session, request: ExecutionRequest, started: list[Call]) -> ExecutionResult:
        arrived_at = time.monotonic()
        queued = True
        self._queued += 1
        try:
            async with session.turn, self._permits:
                queued = False
                self._queued -= 1
                if session.worker.closed.is_set():
                    self._end(session, End.LOST, _DIED)
                self.find(session.id)
                queue_seconds = time.monotonic() - arrived_at
                limited = dataclasses.replace(request, memory_limit_bytes=session.memory_limit_bytes)
                call = session.worker.start(limited, keep=True)
                started.append(call)
                result = await call.done
                self._account(session, call, result)
        finally:
            self._queued -= queued
            self._end_use(session)
        message = f"the session has ended: {session.end}" if session.end else result.message
        return dataclasses.replace(result, queue_seconds=queue_seconds, message=message)

    def _account(self, session: Session, call: Call, result: ExecutionResult) -> None:
        session.calls += 1
        session.run_seconds += result.run_seconds
        if not call.session_alive:
            why = result.message or f"its process ended ({result.status}, exit code {result.exit_code})"
            self._end(session, End.LOST, why)
        elif session.calls >= self.config.max_calls:
            self._end(session, End.EXHAUSTED, f"it has made its {self.config.max_calls} calls")
        elif session.run_seconds >= self.config.max_run_seconds:
            self._end(session, End.EXHAUSTED, f"it has run for its {self.config.max_run_seconds:g} s")

    def _make_room(self) -> None:
        if len(self._sessions) + self._opening < self.config.max_sessions:
            return
        for session in self._sessions.values():
            if not session.pending:
                why = f"it was the longest unused of {self.config.max_sessions} sessions, and a new one came"
                self._end(session, End.EVICTED, why)
                return
        raise SessionsBusyError(self.config.max_sessions)

    def _begin_use(self, session: Session) -> None:
        session.pending += 1
        self._sessions.move_to_end(session.id)
        if session.expiry is not None:
            session.expiry.cancel()

    def _end_use(self, session: Session) -> None:
        session.pending -= 1
        session.used_at = time.monotonic()
        if not session.pending and not session.end:
            self._sessions.move_to_end(session.id)
            self._await_expiry(session)

    def _await_expiry(self, session: Session) -> None:
        why = f"it expired after {session.ttl_seconds:g} s without a call"
        loop = asyncio.get_running_loop()
        session.expiry = loop.call_later(session.ttl_seconds, self._end, session, End.EXPIRED, why)

    async def _watch(self, session: Session) -> None:
        await session.worker.closed.wait()
        self._end(session, End.LOST, _DIED)

    def _end(self, session: Session, end: End, why: str) -> None:
        if session.end:
            return
        session.end = why
        if session.expiry is not None:
            session.expiry.cancel()
        del self._sessions[session.id]
        self._ends[session.id] = why
        if len(self._ends) > _REMEMBERED_ENDS:
            self._ends.popitem(last=False)
        self._metrics.session_ended(end)
        session.worker.close(why)
