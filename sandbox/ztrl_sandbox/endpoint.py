"""One executor as its callers see it: one HTTP request, and what its outcome allows."""

from __future__ import annotations

import asyncio
import enum
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import aiohttp

from ztrl_sandbox.protocol import ExecutionResult, Status

KEEPALIVE_SECONDS = 4.0
"""Below the 5 s after which uvicorn closes an idle connection: a request must not meet it closing."""
_CONNECT_TIMEOUT_SECONDS = 10.0
_BACKOFF_BASE_SECONDS = 0.1
_BACKOFF_CAP_SECONDS = 5.0
_PROBE_TIMEOUT_SECONDS = 5.0
_RESULT_FIELDS = {field.name for field in fields(ExecutionResult)}
_STATUSES = {status.value for status in Status}
_ANSWERS = (200, 201, 204, 404, 409, 413)
"""HTTP statuses with which an executor that works answers a request that makes sense."""
_REFUSALS = {400: "request", 401: "token", 403: "token", 405: "request", 422: "request"}


class Fault(enum.Enum):
    """Why an answer is no verdict on the snippet."""

    OVERLOADED = "overloaded"
    """The queue is full; nothing ran."""
    UNREACHABLE = "unreachable"
    """No connection; nothing ran."""
    BROKEN = "broken"
    """The connection broke, or what came back is no executor's answer; the snippet may have run."""
    FAILED = "failed"
    """The executor says that it failed; the snippet may have run."""
    LATE = "late"
    """The caller's deadline passed; the snippet, if it ran, is stopped by the closed connection."""


class Deadline:
    """A moment after which nobody wants the answer.

    Args:
        seconds: From now; None means never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def remaining_seconds(self) -> float:
        """May be negative; infinite without a deadline."""
        return math.inf if self._at is None else self._at - time.monotonic()

    def timeout(self, at_most_seconds: float = math.inf) -> asyncio.Timeout:
        """Ends what is waited for inside it with ``TimeoutError``."""
        seconds = min(at_most_seconds, self.remaining_seconds)
        return asyncio.timeout(None if seconds == math.inf else seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one request."""

    http_status: int = 0
    """0 when no answer came."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    message: str = ""
    retry_after_seconds: float = 0.0

    def result(self) -> ExecutionResult:
        """As the result of an execution. Fields that this client does not know are dropped."""
        if self.payload.get("status") not in _STATUSES:
            # 413 may come from a proxy, which has no words of ours.
            never_ran = self.fault is Fault.OVERLOADED or self.http_status == 413
            status = Status.REJECTED if never_ran else Status.SANDBOX_ERROR
            return ExecutionResult(status=status, message=self.message)
        known = {name: value for name, value in self.payload.items() if name in _RESULT_FIELDS}
        return ExecutionResult(**{**known, "status": Status(known["status"])})


class Endpoint:
    """The HTTP requests of one executor.

    Args:
        url: ``http://host:port``.
        token: Bearer token, if the executor wants one.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"an executor's URL must start with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        self.outstanding = 0
        """Requests without an answer yet."""
        self.served = 0
        """Requests that it answered without a fault."""
        self.sessions = 0
        """Sessions that it holds."""
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def request(
        self,
        http: aiohttp.ClientSession,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        patience_seconds: float,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask once.

        Args:
            http: The connections to use.
            method: HTTP method.
            path: From the root of the executor.
            body: Sent as JSON.
            patience_seconds: After so long the executor counts as broken.
            deadline: Of the caller; passing it is not the executor's fault.
            headers: Besides the token.

        Raises:
            ValueError: the executor refuses the arguments or the token.
        """
        answer: Answer | None = None
        self.outstanding += 1
        try:
            answer = await self._ask(
                http,
                method,
                path,
                body,
                patience_seconds=patience_seconds,
                deadline=deadline,
                headers=headers,
            )
            return answer
        finally:
            self.outstanding -= 1
            self.settle(answer)

    def settle(self, answer: Answer | None) -> None:
        """Learn from the end of a request.

        Args:
            answer: None when the caller gave up, or its arguments were refused.
        """
        if answer is not None and answer.fault is None:
            self.served += 1

    async def ready(self, http: aiohttp.ClientSession) -> bool:
        """Whether it can run snippets now."""
        try:
            answer = await self._ask(
                http, "GET", "/ready", patience_seconds=_PROBE_TIMEOUT_SECONDS, deadline=Deadline(None)
            )
        except ValueError:  # another server has taken its port
            return False
        return answer.http_status == 200

    async def _ask(
        self,
        http: aiohttp.ClientSession,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        patience_seconds: float,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        remaining_seconds = max(deadline.remaining_seconds, 1e-3)  # 0 would mean no limit
        timeout = aiohttp.ClientTimeout(
            total=min(patience_seconds, remaining_seconds),
            sock_connect=min(_CONNECT_TIMEOUT_SECONDS, remaining_seconds),
        )
        try:
            async with http.request(
                method,
                self.url + path,
                json=body,
                headers={**self._headers, **(headers or {})},
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                return self._understand(response, await response.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return self._no_answer(Fault.UNREACHABLE, error)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and deadline.remaining_seconds <= 0:
                return Answer(fault=Fault.LATE, message=f"no answer from {self.url} before the deadline")
            return self._no_answer(Fault.BROKEN, error)

    def _understand(self, response: aiohttp.ClientResponse, content: bytes) -> Answer:
        if response.status in _REFUSALS:
            refused = _REFUSALS[response.status]
            raise ValueError(f"the executor at {self.url} refuses the {refused}: {content.decode()}")
        payload = _json_object(content)
        said = f"HTTP {response.status} from {self.url}"
        if detail := payload.get("detail"):
            said = f"{detail} ({said})"
        if response.status == 429:
            retry_after = response.headers.get("Retry-After", "")
            return Answer(
                http_status=429,
                payload=payload,
                fault=Fault.OVERLOADED,
                message=said,
                retry_after_seconds=float(retry_after) if retry_after.isdecimal() else 0.0,
            )
        if response.status not in _ANSWERS or (response.status == 200 and not payload):
            return Answer(http_status=response.status, fault=Fault.BROKEN, message=said)
        fault = Fault.FAILED if payload.get("status") == Status.SANDBOX_ERROR else None
        return Answer(http_status=response.status, payload=payload, fault=fault, message=said)

    def _no_answer(self, fault: Fault, error: Exception) -> Answer:
        return Answer(fault=fault, message=f"{type(error).__name__} at {self.url}: {error}")


def open_connections() -> aiohttp.ClientSession:
    """Connections for the life of a client. No limit of their own: the callers have one, or the server queues."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def pause_after(attempt: int, at_least_seconds: float = 0.0) -> float:
    """Seconds to wait after a failed attempt, the first being 1.

    With jitter, so that callers who were rejected together do not return together.
    """
    backoff_seconds = min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** min(attempt - 1, 10))
    return max(at_least_seconds, backoff_seconds) * random.uniform(0.75, 1.25)


def _json_object(content: bytes) -> dict[str, Any]:
    """The object, or an empty one when it is anything else."""
    try:
        payload = json.loads(content)
    except ValueError:
        return {}
    return payload if isinstance(payload, dict) else {}
