"""Which request gets which worker: strictly first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque

from ztrl_sandbox.handles import WorkerHandle


class IdleWorkers:
    """Workers that wait for requests, or requests that wait for workers; never both.

    A worker that becomes idle goes straight to the request that has waited longest. (An ``asyncio.Queue`` lets
    a newcomer take it first, and sends the request that lost it back to the end.)
    """

    def __init__(self) -> None:
        self._workers: deque[WorkerHandle] = deque()
        self._waiters: deque[asyncio.Future[WorkerHandle]] = deque()

    @property
    def idle(self) -> int:
        """Live workers that wait for a request."""
        return sum(not worker.closed.is_set() for worker in self._workers)

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._waiters)

    def put(self, worker: WorkerHandle) -> None:
        """``worker`` is idle."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(worker)
                return
        self._workers.append(worker)

    async def get(self) -> WorkerHandle:
        """The next idle worker. It may be started on until control returns to the event loop."""
        while self._workers:
            worker = self._workers.popleft()
            if not worker.closed.is_set():
                return worker
        add = self._waiters.append
        while True:
            waiter = asyncio.get_running_loop().create_future()
            add(waiter)
            try:
                worker = await waiter
            except asyncio.CancelledError:
                self._withdraw(waiter)
                raise
            if not worker.closed.is_set():
                return worker
            add = self._waiters.appendleft  # it died on the way; this request was the first and is so again

    def _withdraw(self, waiter: asyncio.Future[WorkerHandle]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif not waiter.cancelled():
            self.put(waiter.result())
