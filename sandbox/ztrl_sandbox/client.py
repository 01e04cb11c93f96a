"""An asynchronous client of one executor. Keep one for the life of the program."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Awaitable, Callable, Collection
from types import TracebackType
from typing import Self

import aiohttp

from ztrl_sandbox.client_session import Session
from ztrl_sandbox.endpoint import Answer, Deadline, Endpoint, Fault, open_connections, pause_after
from ztrl_sandbox.memo import Memo
from ztrl_sandbox.protocol import ExecutionResult


class Caller(abc.ABC):
    """What the clients of one and of many executors share: the calls, and when they are made again."""

    def __init__(self, *, max_attempts: int, queue_timeout_seconds: float, memo: Memo | None = None) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {max_attempts}")
        self.max_attempts = max_attempts
        self.queue_timeout_seconds = queue_timeout_seconds
        self.memo = memo
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None

    @property
    def http(self) -> aiohttp.ClientSession:
        """The connections: made on first use, since they belong to the running event loop."""
        if self._http is None:
            self._http = open_connections()
        return self._http

    async def execute(
        self,
        code: str,
        *,
        run_timeout_seconds: float,
        stdin: str | None = None,
        memory_limit_bytes: int | None = None,
        print_last_expression: bool = False,
        deadline_seconds: float | None = None,
    ) -> ExecutionResult:
        """Run ``code`` in a fresh interpreter. Cancelling the call kills the snippet.

        Args:
            code: The snippet.
            run_timeout_seconds: Its time-out, which starts when it does.
            stdin: Its standard input.
            memory_limit_bytes: Lowers the executor's limit.
            print_last_expression: Print the last expression's value if nothing else was printed.
            deadline_seconds: Time for everything: queues, tries, the snippet. When it runs out the status is
                ``rejected`` if nothing ran, else ``sandbox_error``, and the snippet is stopped; it is never
                ``timeout``, which is about the snippet. Nothing is waited for that cannot end in time.

        Raises:
            ValueError: the executor refuses the arguments (say, a time-out above its maximum) or the token.
        """
        body = {
            "code": code,
            "run_timeout_seconds": run_timeout_seconds,
            "stdin": stdin,
            "memory_limit_bytes": memory_limit_bytes,
            "print_last_expression": print_last_expression,
        }
        key = b"" if self.memo is None else self.memo.key(b"", body)
        if self.memo is not None and (remembered := self.memo.get(key)) is not None:
            return remembered
        deadline = Deadline(deadline_seconds)
        patience_seconds = run_timeout_seconds + self.queue_timeout_seconds

        async def send(endpoint: Endpoint) -> Answer:
            return await endpoint.request(
                self.http,
                "POST",
                "/v1/execute",
                body,
                patience_seconds=patience_seconds,
                deadline=deadline,
            )

        answer, _ = await self.send_anywhere(send, deadline)
        result = answer.result()
        if self.memo is not None:
            self.memo.put(key, result)
        return result

    def session(self, *, ttl_seconds: float | None = None, memory_limit_bytes: int | None = None) -> Session:
        """Code that shares variables, call after call: ``async with client.session() as session``.

        Args:
            ttl_seconds: The executor ends the session when it is unused for so long; None is its default.
            memory_limit_bytes: Lowers the executor's limit.
        """
        return Session(self, ttl_seconds=ttl_seconds, memory_limit_bytes=memory_limit_bytes)

    async def send_anywhere(
        self, send: Callable[[Endpoint], Awaitable[Answer]], deadline: Deadline, *, for_session: bool = False
    ) -> tuple[Answer, Endpoint | None]:
        """Make a request that is safe to make twice until an executor serves it, ``max_attempts`` times at most.

        Returns:
            The last answer, and who gave it; None when none could be asked.

        Raises:
            ValueError: the executor refuses the arguments or the token, or there is none at its URL.
        """
        answer, endpoint = Answer(fault=Fault.OVERLOADED, message="no executor was free in time"), None
        tried: set[str] = set()
        for attempt in range(1, self.max_attempts + 1):
            reserved = await self.reserve(deadline, tried, for_session=for_session)
            if reserved is None:
                break
            endpoint = reserved
            tried.add(endpoint.url)
            answer = await send(endpoint)
            if answer.http_status == 404:
                raise ValueError(f"no executor of this version answers at {endpoint.url}: {answer.message}")
            if answer.fault in (None, Fault.LATE):
                break
            pause_seconds = pause_after(attempt, self.least_pause_seconds(endpoint, answer, for_session))
            if attempt == self.max_attempts or pause_seconds >= deadline.remaining_seconds:
                break
            await asyncio.sleep(pause_seconds)
        return answer, endpoint

    @abc.abstractmethod
    async def reserve(
        self, deadline: Deadline, tried: Collection[str], *, for_session: bool
    ) -> Endpoint | None:
        """The executor to ask next, without a pause before it is asked.

        Args:
            deadline: Of the call.
            tried: URLs that this call has asked already.
            for_session: It is to hold a session.

        Returns:
            None when there is none in time.
        """

    @abc.abstractmethod
    def least_pause_seconds(self, endpoint: Endpoint, answer: Answer, for_session: bool) -> float:
        """How long a call must wait after a fault of this executor before it asks again."""


class ExecutorClient(Caller):
    """Runs snippets on an executor and retries what is the executor's own failure.

    A full queue, a refused or broken connection and a ``sandbox_error`` are tried again, ``max_attempts``
    times in all. If none succeeds the result's status is ``rejected`` or ``sandbox_error``: never ``error``,
    and never an exception, so a caller cannot mistake it for the snippet's doing.

    Args:
        url: ``http://host:port``.
        token: Bearer token, if the executor wants one.
        max_attempts: Tries per snippet.
        queue_timeout_seconds: Longest wait for an answer beyond the snippet's own time-out.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        max_attempts: int = 6,
        queue_timeout_seconds: float = 300.0,
    ) -> None:
        super().__init__(max_attempts=max_attempts, queue_timeout_seconds=queue_timeout_seconds)
        self.endpoint = Endpoint(url, token=token)

    async def reserve(
        self, deadline: Deadline, tried: Collection[str], *, for_session: bool
    ) -> Endpoint | None:
        """The only one, which queues for itself."""
        return self.endpoint if deadline.remaining_seconds > 0 else None

    def least_pause_seconds(self, endpoint: Endpoint, answer: Answer, for_session: bool) -> float:
        """As long as the executor says."""
        return answer.retry_after_seconds
