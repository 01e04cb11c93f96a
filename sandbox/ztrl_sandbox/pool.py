"""The server's side of the process tree: keeps the zygote and the workers alive, queues and runs requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztrl_sandbox.cgroup import MemoryCgroups
from ztrl_sandbox.dispatch import IdleWorkers
from ztrl_sandbox.handles import Tier, WorkerHandle, ZygoteHandle
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Limits
from ztrl_sandbox.scratch import remove_tree

_logger = logging.getLogger("ztrl_sandbox")

TIERS = ("basic", "user", "full")
"""Isolation tiers, weakest first."""

_LEASE_ATTEMPTS = 2
_RESPAWN_PAUSE_SECONDS = 0.5
"""Between attempts when a worker or zygote cannot even start."""


class QueueFullError(Exception):
    """The queue is full; try again after ``retry_after_seconds``."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"queue full, retry after {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """What a pool needs to start."""

    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Snippets that run at once; by default one for each core that this process may use."""
    preload: Sequence[str] = ("math", "sympy")
    """Modules that snippets find imported already."""
    isolation: str = "auto"
    """``auto`` (the strongest available) or one of :data:`TIERS`."""
    min_isolation: str = "basic"
    """The weakest tier to accept."""
    queue_limit: int = 4096
    """Requests that may wait for a worker; more are rejected."""
    recycle_after: int = 5000
    """Executions after which a worker is replaced, so that nothing can pile up in it."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.queue_limit < 0:
            raise ValueError(f"queue_limit must not be negative, got {self.queue_limit}")
        if self.recycle_after < 1:
            raise ValueError(f"recycle_after must be at least 1, got {self.recycle_after}")
        if self.min_isolation not in TIERS:
            raise ValueError(f"min_isolation must be one of {', '.join(TIERS)}, got {self.min_isolation!r}")


class WorkerPool:
    """A fixed number of workers behind one bounded first-in first-out queue."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.restarts = 0
        """Workers replaced because they died."""
        self.recycled = 0
        """Workers replaced because they had served long enough."""
        self.tier = Tier()
        """The tier in force; set by :meth:`start`."""
        self._idle = IdleWorkers()
        self._serving: list[WorkerHandle] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._recycling = asyncio.Lock()
        self._workers: set[WorkerHandle] = set()
        """Every worker that is not closed."""
        self._burials: set[asyncio.Task[None]] = set()
        self._free_slots: list[int] = []
        self._slots = 0
        """Numbers in use or in ``_free_slots``."""
        self._zygote: ZygoteHandle | None = None
        self._zygote_lock = asyncio.Lock()
        self._cgroups: MemoryCgroups | None = None
        self._memory_layer = ""
        self._scratch_root = Path(tempfile.mkdtemp(prefix="ztrl-sandbox-"))
        self._mean_run_seconds = 0.1

    async def start(self) -> None:
        """Start everything; returns when every worker is ready.

        Raises:
            ValueError: the configuration cannot be satisfied on this machine.
        """
        try:
            self._memory_layer = self._make_cgroups()
            await self._live_zygote()
            spawning = (self._spawn(self._on_idle) for _ in range(self.config.workers))
            self._serving = await asyncio.gather(*spawning)
        except BaseException:
            await self.stop()
            raise
        for worker in self._serving:
            self._idle.put(worker)
        self._keepers = [asyncio.create_task(self._keep(place)) for place in range(self.config.workers)]
        self._keepers.append(asyncio.create_task(self._keep_zygote()))

    async def stop(self) -> None:
        """Kill what runs (its callers get ``sandbox_error``), end every process, remove every file."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in list(self._workers):
            worker.close()
        await asyncio.gather(*self._burials)
        if self._zygote is not None:
            await self._zygote.close()
        if self._cgroups is not None:
            self._cgroups.close()
        await asyncio.to_thread(remove_tree, self._scratch_root)

    @property
    def isolation_layers(self) -> list[str]:
        """What separates a snippet from the host, for people to read."""
        return [*self.tier.layers, self._memory_layer]

    @property
    def zygote_pid(self) -> int:
        """The zygote, which need not be ready."""
        assert self._zygote is not None
        return self._zygote.pid

    @property
    def worker_pids(self) -> list[int]:
        """Live workers that serve the queue."""
        return [worker.pid for worker in self._serving if not worker.closed.is_set()]

    @property
    def idle(self) -> int:
        """Workers that wait for a request."""
        return self._idle.idle

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return self._idle.queued

    async def execute(self, request: ExecutionRequest) -> ExecutionResult:
        """Run one snippet. Cancelling the caller kills the snippet.

        Raises:
            QueueFullError: too many requests wait already.
        """
        if not self.idle and self.queued >= self.config.queue_limit:
            wait_seconds = self.queued * self._mean_run_seconds / self.config.workers
            raise QueueFullError(max(1, min(60, round(wait_seconds))))
        arrived_at = time.monotonic()
        worker = await self._idle.get()
        queue_seconds = time.monotonic() - arrived_at
        call = worker.start(request)
        try:
            result = await call.done
        except asyncio.CancelledError:
            worker.cancel(call)
            raise
        self._mean_run_seconds += 0.05 * (result.run_seconds - self._mean_run_seconds)
        return dataclasses.replace(result, queue_seconds=queue_seconds)

    async def lease(self) -> WorkerHandle:
        """A worker beside those of the queue, for a session; closing it gives it back.

        Raises:
            OSError, RuntimeError, ValueError: none can be started now.
        """
        for _ in range(_LEASE_ATTEMPTS - 1):
            # The zygote may die at this moment; a new one is there at the next attempt.
            with contextlib.suppress(OSError, RuntimeError):
                return await self._spawn(lambda worker: None)
        return await self._spawn(lambda worker: None)

    def _on_idle(self, worker: WorkerHandle) -> None:
        if worker.served >= self.config.recycle_after:
            worker.due.set()
        self._idle.put(worker)

    async def _keep(self, place: int) -> None:
        """Replace the worker of this place when it dies, and when it has served long enough."""
        while True:
            worker = self._serving[place]
            await worker.due.wait()
            if worker.closed.is_set():
                self.restarts += 1
                _logger.warning("worker %d died and is replaced", worker.slot)
                self._serve(place, await self._spawn_at_last())
            else:
                async with self._recycling:  # not all at once: the old one goes on until the new one is there
                    self._serve(place, await self._spawn_at_last())
                self.recycled += 1
                worker.retire()

    def _serve(self, place: int, worker: WorkerHandle) -> None:
        self._serving[place] = worker
        self._idle.put(worker)

    async def _keep_zygote(self) -> None:
        """Replace the zygote when it dies, so that the next worker need not wait for its imports."""
        while True:
            assert self._zygote is not None
            await self._zygote.dead.wait()
            try:
                await self._live_zygote()
            except (OSError, ValueError) as error:
                _logger.error("the zygote cannot be replaced: %s", error)
                await asyncio.sleep(_RESPAWN_PAUSE_SECONDS)

    async def _spawn_at_last(self) -> WorkerHandle:
        """A new worker, however many attempts it takes."""
        while True:
            try:
                return await self._spawn(self._on_idle)
            except (OSError, RuntimeError, ValueError) as error:
                _logger.error("a worker cannot be started: %s", error)
                await asyncio.sleep(_RESPAWN_PAUSE_SECONDS)

    async def _spawn(self, on_idle: Callable[[WorkerHandle], None]) -> WorkerHandle:
        zygote = await self._live_zygote()
        worker = WorkerHandle(self._take_slot(), self.config.limits, on_idle)
        self._workers.add(worker)
        burial = asyncio.create_task(self._bury(worker))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)
        try:
            self._fork(zygote, worker)
            await worker.armed
        except BaseException:
            worker.armed.cancel()  # nobody waits for it any more
            worker.close()
            raise
        return worker

    def _fork(self, zygote: ZygoteHandle, worker: WorkerHandle) -> None:
        with contextlib.ExitStack() as stack:
            for end in worker.worker_ends:
                stack.enter_context(end)
            cgroup_fd = None
            if self._cgroups is not None:
                cgroup_fd = self._cgroups.open_slot(worker.slot)
                stack.callback(os.close, cgroup_fd)
            zygote.spawn(worker, cgroup_fd)

    async def _bury(self, worker: WorkerHandle) -> None:
        """When the worker is gone, its slot is free."""
        await worker.closed.wait()
        self._workers.discard(worker)
        await worker.ended()
        await asyncio.to_thread(remove_tree, self._scratch_root / f"slot-{worker.slot}")
        if self._cgroups is not None:
            self._cgroups.remove_slot(worker.slot)
        heapq.heappush(self._free_slots, worker.slot)

    def _take_slot(self) -> int:
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        self._slots += 1
        return self._slots - 1

    async def _live_zygote(self) -> ZygoteHandle:
        """The zygote; a new one if it has died."""
        async with self._zygote_lock:
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    _logger.warning("the zygote died and is replaced")
                    await self._zygote.close()
                self._zygote = ZygoteHandle(
                    preload=self.config.preload,
                    isolation=self.config.isolation,
                    limits=self.config.limits,
                    scratch_root=self._scratch_root,
                    cgroups=self._cgroups,
                )
                self.tier = await self._zygote.wait_ready()
            self._check_tier()
            return self._zygote

    def _make_cgroups(self) -> str:
        """Try to; returns what limits the memory of a process tree."""
        try:
            self._cgroups = MemoryCgroups()
        except OSError as error:
            return f"memory watchdog (no cgroup: {error})"
        return "memory cgroup"

    def _check_tier(self) -> None:
        wanted = self.config.min_isolation
        if TIERS.index(self.tier.name) < TIERS.index(wanted):
            raise ValueError(
                f"the isolation tier would be {self.tier.name!r} ({self.tier.reason}), "
                f"below the minimum {wanted!r} that is asked for"
            )
