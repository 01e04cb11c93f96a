"""An asynchronous client of many executors. Keep one for the life of the program."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ztrl_sandbox.client import Caller
from ztrl_sandbox.endpoint import Answer, Deadline, Endpoint, Fault, pause_after
from ztrl_sandbox.memo import Memo

_logger = logging.getLogger("ztrl_sandbox.client")

_FAULTS_BEFORE_EJECTION = 3
"""In a row. Fewer may be a snippet's doing (it took its worker along) or one broken connection."""


class PooledExecutor(Endpoint):
    """One executor, and what the pool knows about it."""

    def __init__(self, url: str, *, token: str | None, on_settled: Callable[[PooledExecutor], None]) -> None:
        super().__init__(url, token=token)
        self.ejected = False
        """Asked nothing but whether it is ready, until it is."""
        self.ejections = 0
        self.full = False
        """Its queue is; the time it named has not passed yet."""
        self.reserved = 0
        """Requests about to be made."""
        self.last_chosen = 0
        self.faults_in_a_row = 0
        self.vain_probes = 0
        """Since it last served: one that is ready and yet fails is asked ever more rarely."""
        self._on_settled = on_settled

    @property
    def load(self) -> int:
        """Requests that it has, or is about to get."""
        return self.outstanding + self.reserved

    def settle(self, answer: Answer | None) -> None:
        """Count faults in a row, and tell the pool."""
        super().settle(answer)
        if answer is not None:
            match answer.fault:
                case None:
                    self.faults_in_a_row = self.vain_probes = 0
                case Fault.UNREACHABLE:
                    self.faults_in_a_row = _FAULTS_BEFORE_EJECTION
                case Fault.BROKEN | Fault.FAILED:
                    self.faults_in_a_row += 1
        self._on_settled(self)


@dataclass(frozen=True, slots=True)
class _Waiter:
    granted: asyncio.Future[PooledExecutor | None]
    """None: all executors are ejected; wait no longer than for that to end."""
    tried: Collection[str]


class ExecutorPool(Caller):
    """Runs snippets on whichever executor has the fewest of them, with the promises of ``ExecutorClient``.

    An executor that cannot be reached, or fails three times in a row (broken connections, HTTP 5xx,
    ``sandbox_error``), is ejected: it is asked nothing but ``/ready``, ever more rarely, until it is. What
    failed is tried again, elsewhere if there is an elsewhere. A session stays with its executor.

    Args:
        urls: ``http://host:port`` of each executor.
        token: Bearer token of all of them.
        max_concurrent_per_executor: Requests that one executor has at a time; more wait here, for whichever
            is free first. Calls in sessions do not wait: each session has a worker of its own.
        max_attempts: Tries per snippet.
        queue_timeout_seconds: Longest wait for an executor to be free, and again for its answer beyond the
            snippet's own time-out.
        outage_timeout_seconds: Longest wait while every executor is ejected.
        memo_entries: Results kept to answer the same call again, in the same place of a session, without
            running it: for replays of code that always prints the same. 0 runs everything.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str | None = None,
        max_concurrent_per_executor: int = 256,
        max_attempts: int = 6,
        queue_timeout_seconds: float = 300.0,
        outage_timeout_seconds: float = 30.0,
        memo_entries: int = 0,
    ) -> None:
        super().__init__(
            max_attempts=max_attempts,
            queue_timeout_seconds=queue_timeout_seconds,
            memo=Memo(memo_entries) if memo_entries else None,
        )
        if max_concurrent_per_executor < 1:
            raise ValueError(
                f"max_concurrent_per_executor must be at least 1, got {max_concurrent_per_executor}"
            )
        self.executors = tuple(PooledExecutor(url, token=token, on_settled=self._on_settled) for url in urls)
        if not urls or len({executor.url for executor in self.executors}) < len(urls):
            raise ValueError(f"urls must name at least one executor, and each once, got {list(urls)}")
        self._max_concurrent_per_executor = max_concurrent_per_executor
        self._outage_timeout_seconds = outage_timeout_seconds
        self._turns = itertools.count(1)
        self._calls_waiting: deque[_Waiter] = deque()
        self._sessions_waiting: deque[_Waiter] = deque()
        self._probing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the connections."""
        for task in self._probing:
            task.cancel()
        await asyncio.gather(*self._probing, return_exceptions=True)
        await super().close()

    async def reserve(
        self, deadline: Deadline, tried: Collection[str], *, for_session: bool
    ) -> Endpoint | None:
        """The executor with the least to do, preferably one that is not in ``tried``; waits its turn for it."""
        while deadline.remaining_seconds > 0:
            executor = self._choose(tried, for_session)
            if executor is not None:
                return executor
            outage = all(executor.ejected for executor in self.executors)
            limit_seconds = self._outage_timeout_seconds if outage else self.queue_timeout_seconds
            waiter = _Waiter(asyncio.get_running_loop().create_future(), tried)
            (self._sessions_waiting if for_session else self._calls_waiting).append(waiter)
            try:
                async with deadline.timeout(limit_seconds):
                    executor = await waiter.granted
            except TimeoutError:
                self._give_back(waiter)
                return None
            except asyncio.CancelledError:
                self._give_back(waiter)
                raise
            if executor is not None:
                executor.reserved -= 1  # and counts as outstanding before anything else runs
                return executor
        return None

    def least_pause_seconds(self, endpoint: Endpoint, answer: Answer, for_session: bool) -> float:
        """None: a full executor is passed over until the time that it named, whoever asks."""
        assert isinstance(endpoint, PooledExecutor)
        if answer.fault is Fault.OVERLOADED and not for_session and not endpoint.full:
            endpoint.full = True
            asyncio.get_running_loop().call_later(
                pause_after(1, answer.retry_after_seconds), self._no_longer_full, endpoint
            )
        return 0.0

    def _choose(self, tried: Collection[str], for_session: bool) -> PooledExecutor | None:
        candidates = [
            executor
            for executor in self.executors
            if not executor.ejected
            and (for_session or (executor.load < self._max_concurrent_per_executor and not executor.full))
        ]
        if not candidates:
            return None
        chosen = min(
            candidates,
            key=lambda executor: (
                executor.url in tried,
                executor.sessions if for_session else executor.load,
                executor.last_chosen,  # so that the first in the list is not every tie's winner
            ),
        )
        chosen.last_chosen = next(self._turns)
        return chosen

    def _serve_waiters(self) -> None:
        for waiters, for_session in ((self._calls_waiting, False), (self._sessions_waiting, True)):
            while waiters:
                if not waiters[0].granted.done():  # else its caller gave up
                    executor = self._choose(waiters[0].tried, for_session)
                    if executor is None:
                        break
                    executor.reserved += 1
                    waiters[0].granted.set_result(executor)
                waiters.popleft()

    def _give_back(self, waiter: _Waiter) -> None:
        """What was granted at the very moment when its caller gave up."""
        if waiter.granted.done() and not waiter.granted.cancelled():
            executor = waiter.granted.result()
            if executor is not None:
                executor.reserved -= 1
                self._serve_waiters()

    def _no_longer_full(self, executor: PooledExecutor) -> None:
        executor.full = False
        self._serve_waiters()

    def _on_settled(self, executor: PooledExecutor) -> None:
        if executor.faults_in_a_row >= _FAULTS_BEFORE_EJECTION and not executor.ejected:
            self._eject(executor)
        self._serve_waiters()

    def _eject(self, executor: PooledExecutor) -> None:
        executor.ejected = True
        executor.ejections += 1
        _logger.warning("executor %s is ejected until it is ready", executor.url)
        task = asyncio.get_running_loop().create_task(self._readmit(executor))
        self._probing.add(task)
        task.add_done_callback(self._probing.discard)
        if all(other.ejected for other in self.executors):
            for waiter in (*self._calls_waiting, *self._sessions_waiting):
                if not waiter.granted.done():
                    waiter.granted.set_result(None)

    async def _readmit(self, executor: PooledExecutor) -> None:
        """Probe it until it is ready."""
        while executor.ejected:
            executor.vain_probes += 1
            await asyncio.sleep(pause_after(executor.vain_probes))
            executor.ejected = not await executor.ready(self.http)
        executor.faults_in_a_row = 0
        _logger.warning("executor %s is ready again", executor.url)
        self._serve_waiters()
