"""Servers that live on a node of the cluster: SGLang engines and executors, each hosted by a Ray actor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.engines.server import EngineServer, end_of_log
from megatron_ztrl.runtime.cluster import cluster_gpus, user_facing

STOP_SECONDS = 60.0
"""The longest that a host may take to end its server; then it is killed, and the server with it."""
EXECUTOR_FAREWELL_SECONDS = 10.0
"""An executor that hangs does not end when it is asked to."""


class Started(NamedTuple):
    """A server that serves."""

    url: str
    pid: int
    """On its node."""


class ServerDied(RuntimeError):
    """A server could not be started; the message says why."""


class Server(Protocol):
    """A server process that can be started, again and again, and stopped."""

    async def start(self) -> Started:
        """Returns once it serves."""
        ...

    async def wait(self) -> str:
        """Waits for the end of the process. Returns what there is to say about it."""
        ...

    async def stop(self) -> None:
        """Ends the process, if there is one, and all that it started."""
        ...


class Engine:
    """An `EngineServer` as a `Server`."""

    def __init__(self, build: Callable[[], EngineServer]) -> None:
        self._build = build
        self._server: EngineServer | None = None

    async def start(self) -> Started:
        self._server = self._build()  # which takes a port of its own
        self._server.start()  # in this thread, which lives as long as the host: the engine dies with it
        await asyncio.to_thread(self._server.wait_healthy)
        return Started(self._server.url, self._server.pid)

    async def wait(self) -> str:
        assert self._server is not None, "start() first"
        return await asyncio.to_thread(self._server.wait)

    async def stop(self) -> None:
        if self._server is not None:
            await asyncio.to_thread(self._server.stop)


class Executor:
    """An `ExecutorServer` as a `Server`; it keeps its port."""

    def __init__(self, server: ExecutorServer, log_path: Path) -> None:
        self._server = server
        self._log_path = log_path

    async def start(self) -> Started:
        return Started(await self._server.start(), self._server.pid)

    async def wait(self) -> str:
        url, code = self._server.url, await self._server.wait()
        return f"executor {url} ended with code {code}\n{end_of_log(self._log_path)}"

    async def stop(self) -> None:
        try:
            async with asyncio.timeout(EXECUTOR_FAREWELL_SECONDS):
                await self._server.stop()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._server.pid, signal.SIGKILL)
            await self._server.stop()


class _Host:
    """Runs in the actor: the server is its child, and dies with it."""

    def __init__(self, build: Callable[[Started | None], Server], before: Started | None) -> None:
        self._server = build(before)

    async def exist(self) -> None:
        """Returns once the host has its place on the cluster."""

    async def start(self) -> Started:
        return await self._server.start()

    async def restart(self) -> Started:
        await self._server.stop()
        return await self._server.start()

    async def wait(self) -> str:
        return await self._server.wait()

    async def stop(self) -> None:
        await self._server.stop()


class HostedServer:
    """A server on some node of the cluster.

    Args:
        build: Makes the server, given the last one that a host of this place had; called on its node.
        gpus: GPUs it needs when the cluster has any.
        node: Ray's id of the node to run on; None leaves the choice to Ray.
    """

    def __init__(
        self, build: Callable[[Started | None], Server], *, gpus: int = 0, node: str | None = None
    ) -> None:
        self._build = build
        self._gpus = gpus if cluster_gpus() else 0
        self._node = node
        self._started: Started | None = None
        self._new_host()

    async def start(self) -> Started:
        """Starts the server and waits until it serves.

        Raises:
            ServerDied: It did not start.
            ValueError: What the user asked of it cannot be.
        """
        from ray.exceptions import RayError

        try:
            await self._placement()
            self._started = await user_facing(self._host.start.remote())
        except RayError as error:
            raise _died(error) from error
        return self._started

    async def restart(self) -> Started:
        """Ends what is left of the server, and starts it again, with the same GPUs while its node lives.

        Raises:
            ServerDied: It did not start.
        """
        from ray.exceptions import RayActorError, RayError

        try:
            try:
                await self._placement()
                self._started = await self._host.restart.remote()
            except RayActorError:  # its node is gone, or somebody killed the host
                self._new_host()
                await self._placement()
                self._started = await self._host.start.remote()
        except RayError as error:
            raise _died(error) from error
        return self._started

    async def wait(self) -> str:
        """Waits until the server has ended, of itself or otherwise, or its host. Returns how."""
        from ray.exceptions import RayError

        try:
            return await self._host.wait.remote()
        except RayError as error:
            return str(_died(error))

    async def stop(self) -> None:
        """Stops the server, then its host, whether that answers or not."""
        import ray
        from ray.exceptions import RayActorError

        try:
            if self._placed:  # else there is nobody to answer
                # One that died has taken the server along; one that hangs does so now.
                with contextlib.suppress(RayActorError, TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._host.stop.remote()
        finally:
            ray.kill(self._host)

    async def _placement(self) -> None:
        """Waits for GPUs, if there are not enough."""
        await self._host.exist.remote()
        self._placed = True

    def _new_host(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(num_cpus=0, num_gpus=self._gpus)(_Host)
        if self._node is not None:
            remote = remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False)
            )
        self._host = remote.remote(self._build, self._started)
        self._placed = False


def _died(error: Exception) -> ServerDied:
    """What Ray says of a server that did not start, in words for people."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return ServerDied(str(error.cause) or repr(error.cause))
    return ServerDied(f"its host on the cluster died: {error}")
