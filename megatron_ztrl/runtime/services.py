"""Servers that live on a node of the cluster: SGLang engines and executors, each hosted by a Ray actor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.runtime.cluster import cluster_gpus, user_facing


class Server(Protocol):
    """A server process that can be started and stopped."""

    async def start(self) -> str:
        """Returns the URL once it serves."""
        ...

    async def stop(self) -> None: ...


class Engine:
    """An `EngineServer` as a `Server`."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server

    async def start(self) -> str:
        self._server.start()  # in this thread, which lives as long as the host: the engine dies with it
        await asyncio.to_thread(self._server.wait_healthy)
        return self._server.url

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)


class _Host:
    """Runs in the actor: the server is its child, and dies with it."""

    def __init__(self, build: Callable[[], Server]) -> None:
        self._server = build()

    async def start(self) -> str:
        return await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()


class HostedServer:
    """A server on some node of the cluster.

    Args:
        build: Makes the server; called on its node.
        gpus: GPUs it needs when the cluster has any.
        node: Ray's id of the node to run on; None leaves the choice to Ray.
    """

    def __init__(self, build: Callable[[], Server], *, gpus: int = 0, node: str | None = None) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(num_cpus=0, num_gpus=gpus if cluster_gpus() else 0)(_Host)
        if node is not None:
            remote = remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        self._host = remote.remote(build)

    async def start(self) -> str:
        """Starts the server and waits until it serves. Returns its URL."""
        return await user_facing(self._host.start.remote())

    async def stop(self) -> None:
        """Stops the server, then its host."""
        import ray

        try:
            await self._host.stop.remote()
        finally:
            ray.kill(self._host)
