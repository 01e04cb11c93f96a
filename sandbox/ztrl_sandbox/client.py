"""An asynchronous client of one executor. Keep one for the life of the program."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from types import TracebackType
from typing import Any, Self

import aiohttp

from ztrl_sandbox.protocol import ExecutionResult, Status

_CONNECT_TIMEOUT_SECONDS = 10.0
_BACKOFF_BASE_SECONDS = 0.1
_BACKOFF_CAP_SECONDS = 5.0
_RESULT_FIELDS = {field.name for field in dataclasses.fields(ExecutionResult)}


class ExecutorClient:
    """Runs snippets on an executor and retries what is the executor's own failure.

    A full queue, a refused or broken connection and a ``sandbox_error`` are tried again, ``max_attempts``
    times in all. If none succeeds the result's status is ``rejected`` or ``sandbox_error``: never ``error``,
    and never an exception, so a caller cannot mistake it for the snippet's doing.

    Args:
        url: ``http://host:port``.
        max_attempts: Tries per snippet.
        queue_timeout_seconds: Longest wait for an answer beyond the snippet's own time-out.
    """

    def __init__(self, url: str, *, max_attempts: int = 6, queue_timeout_seconds: float = 300.0) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {max_attempts}")
        self._url = url.rstrip("/")
        self._max_attempts = max_attempts
        self._queue_timeout_seconds = queue_timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def execute(
        self,
        code: str,
        *,
        run_timeout_seconds: float,
        stdin: str | None = None,
        memory_limit_bytes: int | None = None,
        print_last_expression: bool = False,
    ) -> ExecutionResult:
        """Run ``code``. Cancelling the call kills the snippet.

        Raises:
            ValueError: the executor refuses the arguments (say, a time-out above its maximum).
        """
        body = {
            "code": code,
            "run_timeout_seconds": run_timeout_seconds,
            "stdin": stdin,
            "memory_limit_bytes": memory_limit_bytes,
            "print_last_expression": print_last_expression,
        }
        for attempt in range(1, self._max_attempts + 1):
            result, retry_after_seconds = await self._attempt(body)
            if retry_after_seconds is None or attempt == self._max_attempts:
                break
            backoff_seconds = min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** (attempt - 1))
            # Jitter, so that rejected callers do not all return at once.
            await asyncio.sleep(max(retry_after_seconds, backoff_seconds) * random.uniform(0.75, 1.25))
        return result

    async def _attempt(self, body: dict[str, Any]) -> tuple[ExecutionResult, float | None]:
        """One try: its result, and the least pause before the next; None when there must not be one."""
        timeout = aiohttp.ClientTimeout(
            total=body["run_timeout_seconds"] + self._queue_timeout_seconds,
            sock_connect=_CONNECT_TIMEOUT_SECONDS,
        )
        try:
            async with self._open_session().post(
                f"{self._url}/v1/execute", json=body, timeout=timeout
            ) as response:
                if response.status == 422:
                    raise ValueError(
                        f"the executor at {self._url} refuses the request: {await response.text()}"
                    )
                if response.status not in (200, 413, 429):
                    return _failure(f"HTTP {response.status} from {self._url}"), 0.0
                result = _parse(await response.json())
                retry_after_seconds = float(response.headers.get("Retry-After", "0"))
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            return _failure(f"{type(error).__name__} at {self._url}: {error}"), 0.0
        retry = response.status == 429 or result.status is Status.SANDBOX_ERROR
        return result, retry_after_seconds if retry else None

    def _open_session(self) -> aiohttp.ClientSession:
        # Made on first use, since it belongs to the running event loop. No limit: the server queues.
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session


def _failure(message: str) -> ExecutionResult:
    return ExecutionResult(status=Status.SANDBOX_ERROR, message=message)


def _parse(payload: dict[str, Any]) -> ExecutionResult:
    """Fields of a newer server that this client does not know are dropped."""
    known = {name: value for name, value in payload.items() if name in _RESULT_FIELDS}
    return ExecutionResult(**{**known, "status": Status(payload["status"])})
