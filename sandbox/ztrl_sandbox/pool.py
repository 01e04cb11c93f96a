"""The server's side of the process tree: keeps the zygote and the workers alive, queues and runs requests."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztrl_sandbox.handles import Tier, WorkerHandle, ZygoteHandle
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Limits

_logger = logging.getLogger("ztrl_sandbox")

TIERS = ("basic", "user", "full")
"""Isolation tiers, weakest first."""

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

    workers: int = 2
    """Snippets that run at once."""
    preload: Sequence[str] = ("math", "sympy")
    """Modules that snippets find imported already."""
    isolation: str = "auto"
    """``auto`` (the strongest available) or one of :data:`TIERS`."""
    min_isolation: str = "basic"
    """The weakest tier to accept."""
    queue_limit: int = 4096
    """Requests that may wait for a worker; more are rejected."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.queue_limit < 0:
            raise ValueError(f"queue_limit must not be negative, got {self.queue_limit}")
        if self.min_isolation not in TIERS:
            raise ValueError(f"min_isolation must be one of {', '.join(TIERS)}, got {self.min_isolation!r}")


class WorkerPool:
    """A fixed number of workers behind one bounded first-in first-out queue."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.queued = 0
        self.restarts = 0
        self.tier = Tier()
        """The tier in force; set by :meth:`start`."""
        self._idle: asyncio.Queue[WorkerHandle] = asyncio.Queue()
        self._workers: dict[int, WorkerHandle] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._zygote: ZygoteHandle | None = None
        self._zygote_lock = asyncio.Lock()
        self._scratch_root = Path(tempfile.mkdtemp(prefix="ztrl-sandbox-"))
        self._mean_run_seconds = 0.1

    async def start(self) -> None:
        """Start everything; returns when every worker is ready.

        Raises:
            ValueError: the configuration cannot be satisfied on this machine.
        """
        try:
            await self._live_zygote()
            await asyncio.gather(*(self._spawn(slot) for slot in range(self.config.workers)))
        except BaseException:
            await self.stop()
            raise
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self.config.workers)]

    async def stop(self) -> None:
        """Kill what runs (its callers get ``sandbox_error``), end every process, remove every file."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            worker.close()
        await asyncio.gather(*(_process_end(worker.pid) for worker in workers))
        if self._zygote is not None:
            await self._zygote.close()
        shutil.rmtree(self._scratch_root, ignore_errors=True)

    @property
    def zygote_pid(self) -> int:
        """The zygote, which need not be ready."""
        assert self._zygote is not None
        return self._zygote.pid

    @property
    def worker_pids(self) -> list[int]:
        """Live workers."""
        return [worker.pid for worker in self._workers.values() if not worker.closed.is_set()]

    @property
    def idle(self) -> int:
        """Workers that wait for a request."""
        return self._idle.qsize()

    async def execute(self, request: ExecutionRequest) -> ExecutionResult:
        """Run one snippet. Cancelling the caller kills the snippet.

        Raises:
            QueueFullError: too many requests wait already.
        """
        if self._idle.empty() and self.queued >= self.config.queue_limit:
            wait_seconds = self.queued * self._mean_run_seconds / self.config.workers
            raise QueueFullError(max(1, min(60, round(wait_seconds))))
        arrived_at = time.monotonic()
        self.queued += 1
        try:
            worker = await self._idle.get()
            while worker.closed.is_set():
                worker = await self._idle.get()
        finally:
            self.queued -= 1
        queue_seconds = time.monotonic() - arrived_at
        call = worker.start(request)
        try:
            result = await call.done
        except asyncio.CancelledError:
            worker.cancel()
            raise
        self._mean_run_seconds += 0.05 * (result.run_seconds - self._mean_run_seconds)
        return dataclasses.replace(result, queue_seconds=queue_seconds)

    async def _keep(self, slot: int) -> None:
        """Replace this slot's worker whenever it dies."""
        while True:
            await self._workers[slot].closed.wait()
            await _process_end(self._workers[slot].pid)
            self.restarts += 1
            _logger.warning("worker %d died and is replaced", slot)
            while True:
                try:
                    await self._spawn(slot)
                    break
                except (OSError, RuntimeError, ValueError) as error:
                    _logger.error("worker %d cannot be started: %s", slot, error)
                    await asyncio.sleep(_RESPAWN_PAUSE_SECONDS)

    async def _spawn(self, slot: int) -> None:
        zygote = await self._live_zygote()
        shutil.rmtree(self._scratch_root / f"slot-{slot}", ignore_errors=True)
        worker = WorkerHandle(slot, self.config.limits, self._idle.put_nowait)
        try:
            zygote.spawn(worker)
        finally:
            for end in worker.worker_ends:
                end.close()
        try:
            await worker.armed
        except BaseException:
            worker.close()
            raise
        self._workers[slot] = worker
        self._idle.put_nowait(worker)

    async def _live_zygote(self) -> ZygoteHandle:
        """The zygote; a new one if it has died."""
        async with self._zygote_lock:
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    await self._zygote.close()
                self._zygote = ZygoteHandle(
                    preload=self.config.preload,
                    isolation=self.config.isolation,
                    limits=self.config.limits,
                    scratch_root=self._scratch_root,
                )
                self.tier = await self._zygote.wait_ready()
            self._check_tier()
            return self._zygote

    def _check_tier(self) -> None:
        wanted = self.config.min_isolation
        if TIERS.index(self.tier.name) < TIERS.index(wanted):
            raise ValueError(
                f"the isolation tier would be {self.tier.name!r} ({self.tier.reason}), "
                f"below the minimum {wanted!r} that is asked for"
            )


async def _process_end(pid: int) -> None:
    """Wait until a worker is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)
