"""The executors of a run: one on every node, or those that the configuration names."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ztrl_sandbox.client_pool import ExecutorPool
from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.config.schema import Config, SandboxConfig
from megatron_ztrl.envs.base import Execute
from megatron_ztrl.runtime.cluster import node_address
from megatron_ztrl.runtime.processes import ProcessTable
from megatron_ztrl.runtime.services import Executor, HostedServer, Started
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.types import ExecutionResult, ExecutionStatus

PROBE_INTERVAL_SECONDS = 10.0
HANGS_SECONDS = 120.0
"""An executor whose process lives, and that is not ready for so long, is started again."""


class RunExecutors:
    """One executor on each node, or those that ``sandbox.urls`` names, which are not this run's to look after.

    Args:
        config: The run.
        nodes: Ray's ids of them.
        logs: Directory for ``executor<i>.log``.
        processes: Learns about every executor.
    """

    def __init__(self, config: Config, nodes: Sequence[str], logs: Path, processes: ProcessTable) -> None:
        self.config = config
        self.processes = processes
        self._pool: ExecutorPool | None = None
        self._slots: list[ExecutorSlot] = []
        self._token: str | None
        if config.sandbox.urls:
            self._token = _read_token(config.sandbox)
        else:
            self._token = secrets.token_urlsafe()  # on a cluster they listen where others can reach them
            for index, node in enumerate(nodes):
                server = _hosted(config.sandbox, node, self._token, logs / f"executor{index}.log")
                self._slots.append(ExecutorSlot(self, index, server))
        self.left = set(self._slots)
        """Those that were not given up."""

    async def start(self) -> ExecutorPool:
        """Starts them. Returns their client, which ``stop`` closes."""
        started = await asyncio.gather(*(slot.server.start() for slot in self._slots))
        for slot, each in zip(self._slots, started, strict=True):
            slot.came_up(each)
        tool = self.config.tool
        self._pool = ExecutorPool(
            [each.url for each in started] or self.config.sandbox.urls,
            token=self._token,
            max_concurrent_per_executor=tool.max_concurrent,
            max_attempts=tool.retries + 1,
        )
        return self._pool

    def supervise(self, supervisor: Supervisor) -> None:
        """Starts each again that dies, where it was: the pool finds it there."""
        for slot in self._slots:
            supervisor.watch(slot)

    async def ready(self, url: str) -> bool:
        """Whether one of them can run snippets now."""
        assert self._pool is not None, "start() first"
        (executor,) = (executor for executor in self._pool.executors if executor.url == url)
        return await executor.ready(self._pool.http)

    async def stop(self) -> None:
        """Stops them."""
        if self._pool is not None:
            await self._pool.close()
        await asyncio.gather(*(slot.server.stop() for slot in self._slots))


class ExecutorSlot:
    """A place for an executor. A `supervision.Charge`."""

    def __init__(self, run: RunExecutors, index: int, server: HostedServer) -> None:
        self.name = f"executor {index}"
        self.server = server
        self.max_restarts = run.config.sandbox.max_restarts
        self._run = run
        self._url = ""

    def came_up(self, started: Started) -> None:
        """It serves, at the URL that it had before."""
        self._url = started.url
        self._run.processes.update(self.name, **started._asdict(), state="serves")

    async def fails(self) -> str:
        """Returns when it hangs. Whether it is asked meanwhile is for the pool to judge."""
        ready_at = time.monotonic()
        while True:
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)
            if await self._run.ready(self._url):
                ready_at = time.monotonic()
            elif time.monotonic() - ready_at > HANGS_SECONDS:
                return f"{self.name} was not ready for {HANGS_SECONDS:.0f} s"

    def went_down(self) -> None:
        """The pool notices."""
        self._run.processes.update(self.name, state="starts")
        self._run.processes.count_restart(self.name)

    def give_up(self) -> bool:
        """Whether there are other executors."""
        self._run.left.discard(self)
        self._run.processes.remove(self.name)
        return bool(self._run.left)


def _read_token(sandbox: SandboxConfig) -> str | None:
    return None if sandbox.token_file is None else Path(sandbox.token_file).read_text().strip()


def _hosted(sandbox: SandboxConfig, node: str, token: str, log_path: Path) -> HostedServer:
    def build(before: Started | None) -> Executor:
        server = ExecutorServer(
            host=node_address(),
            port=(before and urlsplit(before.url).port) or 0,  # the pool knows it there
            token=token,
            workers=sandbox.workers,
            preload=sandbox.preload,
            memory_limit_bytes=sandbox.memory_limit_bytes,
            isolation=sandbox.isolation,
            min_isolation=sandbox.min_isolation,
            log_path=log_path,
        )
        return Executor(server, log_path)

    return HostedServer(build, node=node)


def run_snippets(executors: ExecutorPool, *, run_timeout_seconds: float) -> Execute:
    """The Python tool's view of the executors."""

    async def execute(code: str) -> ExecutionResult:
        outcome = await executors.execute(code, run_timeout_seconds=run_timeout_seconds)
        return ExecutionResult(
            status=ExecutionStatus(outcome.status),
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            run_seconds=outcome.run_seconds,
            queue_seconds=outcome.queue_seconds,
        )

    return execute
