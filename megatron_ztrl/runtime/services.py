"""Servers that live on a node of the cluster: SGLang engines and executors, each hosted by a Ray actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from megatron_ztrl.runtime.cluster import cluster_gpus, result


class Server(Protocol):
    """A server process that can be started and stopped."""

    url: str

    def start(self) -> None: ...

    def stop(self) -> None: ...


class _Host:
    """Runs in the actor: the server is its child, and dies with it."""

    def __init__(self, build: Callable[[], Server]) -> None:
        self._server = build()

    def start(self) -> str:
        self._server.start()
        return self._server.url

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._server, method)(*args)

    def stop(self) -> None:
        self._server.stop()


class HostedServer:
    """A server on some node of the cluster.

    Args:
        build: Makes the server; called on its node.
        gpus: GPUs it needs when the cluster has any.
    """

    def __init__(self, build: Callable[[], Server], *, gpus: int = 0) -> None:
        import ray

        remote = ray.remote(num_cpus=0, num_gpus=gpus if cluster_gpus() else 0)(_Host)
        self._host = remote.remote(build)

    async def start(self) -> str:
        """Starts the server and waits until it serves. Returns its URL."""
        return await result(self._host.start.remote())

    async def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the server object on its node."""
        return await result(self._host.call.remote(method, *args))

    async def stop(self) -> None:
        """Stops the server, then its host."""
        import ray

        try:
            await self._host.stop.remote()
        finally:
            ray.kill(self._host)
