"""A session as its caller sees it: code that shares variables, on one executor, until it ends or is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from ztrl_sandbox.endpoint import Answer, Deadline, Endpoint, Fault, pause_after
from ztrl_sandbox.protocol import ExecutionResult, Status

if TYPE_CHECKING:
    from ztrl_sandbox.client import Caller

ROUTE_HEADER = "X-Session-Route"
"""Random, the same in every request of a session: a proxy that hashes it sends all of them to one executor."""
_ROUTES_PER_TRY = 4
"""Behind a proxy a route leads to one executor only, which may be the one that is down."""
_CLOSE_TIMEOUT_SECONDS = 5.0
"""For the answer to a DELETE."""


class Session:
    """Variables that persist from one call to the next. Made by ``client.session()``.

    The executor's side is opened by the first call. It is *lost* when its process ends (``sys.exit``, a
    time-out that could not be interrupted, too much memory), when its executor dies or forgets it, and when a
    call was cancelled, ran into its deadline or broke off, since nobody knows what that call has done. The
    call that loses it reports what happened to that call; every later one is ``rejected`` with the reason in
    ``message``. Nothing that may have run is run again.
    """

    def __init__(self, caller: Caller, *, ttl_seconds: float | None, memory_limit_bytes: int | None) -> None:
        self._caller = caller
        self._options = {"ttl_seconds": ttl_seconds, "memory_limit_bytes": memory_limit_bytes}
        self._endpoint: Endpoint | None = None
        self._path = ""
        self._headers: dict[str, str] = {}
        self._lost = ""
        self._turn = asyncio.Lock()
        self._memo = caller.memo
        self._prefix = f"session of {memory_limit_bytes} bytes".encode()
        """Memo key of the last call."""
        self._not_yet_run: list[tuple[Mapping[str, Any], ExecutionResult]] = []
        """Calls answered from the memo, which the executor must catch up with before it runs another."""

    @property
    def alive(self) -> bool:
        """Whether another call may succeed."""
        return not self._lost

    @property
    def url(self) -> str | None:
        """The executor that holds it; None before the first call."""
        return None if self._endpoint is None else self._endpoint.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End it. Should the executor not hear of it, the session's time to live ends it."""
        self._lose("it was closed")
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            endpoint.sessions -= 1
            await self._send(endpoint, "DELETE", "", None, Deadline(_CLOSE_TIMEOUT_SECONDS))

    async def execute(
        self,
        code: str,
        *,
        run_timeout_seconds: float,
        stdin: str | None = None,
        print_last_expression: bool = False,
        deadline_seconds: float | None = None,
    ) -> ExecutionResult:
        """Run ``code`` where the calls before it ran. Calls made at the same time run one after the other.

        Args: those of ``ExecutorClient.execute``; the memory limit is the session's.

        Raises:
            ValueError: the executor refuses the arguments or the token.
        """
        body = {
            "code": code,
            "run_timeout_seconds": run_timeout_seconds,
            "stdin": stdin,
            "print_last_expression": print_last_expression,
        }
        deadline = Deadline(deadline_seconds)
        try:
            async with deadline.timeout():
                await self._turn.acquire()
        except TimeoutError:
            return _rejected("the session was busy until the deadline")
        try:
            return await self._execute(body, deadline)
        except asyncio.CancelledError:
            self._lose("a call in it was cancelled")
            raise
        finally:
            self._turn.release()

    async def _execute(self, body: Mapping[str, Any], deadline: Deadline) -> ExecutionResult:
        if self._lost:
            return _rejected(f"the session is lost: {self._lost}")
        key = b""
        if self._memo is not None:
            key = self._memo.key(self._prefix, body)
            if (remembered := self._memo.get(key)) is not None:
                self._prefix = key
                self._not_yet_run.append((body, remembered))
                return remembered
        failure = await self._open(deadline) or await self._catch_up(deadline)
        if failure is not None:
            return failure
        result = await self._run(body, deadline)
        if self._memo is not None and result.status is not Status.REJECTED:
            if self.alive and self._memo.put(key, result):
                self._prefix = key
            else:
                self._memo = None  # what the variables are now, only this executor knows
        return result

    async def _open(self, deadline: Deadline) -> ExecutionResult | None:
        """Have an executor hold the session; returns why none does."""
        if self._endpoint is not None:
            return None
        answer, endpoint = await self._caller.send_anywhere(
            lambda endpoint: self._create(endpoint, deadline), deadline, for_session=True
        )
        if answer.fault is not None or endpoint is None:
            return answer.result()
        self._endpoint = endpoint
        self._endpoint.sessions += 1
        self._path = "/v1/sessions/" + quote(answer.payload["session_id"], safe="")
        return None

    async def _create(self, endpoint: Endpoint, deadline: Deadline) -> Answer:
        for _ in range(_ROUTES_PER_TRY):
            self._headers = {ROUTE_HEADER: secrets.token_hex(16)}
            answer = await endpoint.request(
                self._caller.http,
                "POST",
                "/v1/sessions",
                self._options,
                patience_seconds=self._caller.queue_timeout_seconds,
                deadline=deadline,
                headers=self._headers,
            )
            if answer.http_status != HTTPStatus.BAD_GATEWAY:
                break
        return answer

    async def _catch_up(self, deadline: Deadline) -> ExecutionResult | None:
        """Run what was answered from the memo; returns why that failed."""
        while self._not_yet_run:
            body, expected = self._not_yet_run[0]
            result = await self._run(body, deadline)
            if result.status.is_infrastructure:
                return result
            if (result.status, result.stdout) != (expected.status, expected.stdout):
                self._lose("running its code again gave another output than before")
            if self._lost:
                return _rejected(f"the session is lost: {self._lost}")
            self._not_yet_run.pop(0)
        return None

    async def _run(self, body: Mapping[str, Any], deadline: Deadline) -> ExecutionResult:
        assert self._endpoint is not None
        answer = Answer(fault=Fault.OVERLOADED, message="the deadline passed")
        for attempt in range(1, self._caller.max_attempts + 1):
            if deadline.remaining_seconds <= 0:
                break
            answer = await self._send(self._endpoint, "POST", "/execute", body, deadline)
            pause_seconds = pause_after(attempt, answer.retry_after_seconds)
            if answer.fault not in (Fault.OVERLOADED, Fault.UNREACHABLE):
                break
            if attempt == self._caller.max_attempts or pause_seconds >= deadline.remaining_seconds:
                break
            await asyncio.sleep(pause_seconds)
        return self._judge(answer)

    def _judge(self, answer: Answer) -> ExecutionResult:
        """The result of a call, and whether there can be another."""
        if answer.http_status == 404:
            self._lose(answer.message)
            return _rejected(f"the session is lost: {self._lost}")
        result = answer.result()
        if answer.fault in (Fault.UNREACHABLE, Fault.BROKEN, Fault.LATE):
            self._lose(answer.message)
        elif answer.fault is not Fault.OVERLOADED and not answer.payload.get(
            "session_alive", not answer.fault
        ):
            self._lose(result.message or f"its process ended: {result.status}")
        return result

    async def _send(
        self, endpoint: Endpoint, method: str, path: str, body: Mapping[str, Any] | None, deadline: Deadline
    ) -> Answer:
        run_seconds = 0.0 if body is None else body["run_timeout_seconds"]
        return await endpoint.request(
            self._caller.http,
            method,
            self._path + path,
            body,
            patience_seconds=run_seconds + self._caller.queue_timeout_seconds,
            deadline=deadline,
            headers=self._headers,
        )

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason


def _rejected(message: str) -> ExecutionResult:
    return ExecutionResult(status=Status.REJECTED, message=message)
