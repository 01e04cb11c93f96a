"""The executors of a run: one on every node, or those that the configuration names."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from ztrl_sandbox.client_pool import ExecutorPool
from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.config.schema import Config, SandboxConfig
from megatron_ztrl.envs.python_tool import Execute
from megatron_ztrl.runtime.cluster import node_address
from megatron_ztrl.runtime.services import HostedServer
from megatron_ztrl.types import ExecutionResult, ExecutionStatus


async def start_executors(
    config: Config, nodes: Sequence[str], logs: Path, stack: AsyncExitStack
) -> ExecutorPool:
    """Starts one executor on each node, unless ``sandbox.urls`` names running ones.

    Args:
        config: The run.
        nodes: Ray's ids of them.
        logs: Directory for ``executor<i>.log``.
        stack: Stops them.
    """
    sandbox = config.sandbox
    if sandbox.urls:
        urls, token = sandbox.urls, _read_token(sandbox)
    else:
        token = secrets.token_urlsafe()  # on a cluster they listen where others can reach them
        urls = await _start_on_nodes(sandbox, nodes, logs, token, stack)
    pool = ExecutorPool(
        urls,
        token=token,
        max_concurrent_per_executor=config.tool.max_concurrent,
        max_attempts=config.tool.retries + 1,
    )
    stack.push_async_callback(pool.close)
    return pool


def _read_token(sandbox: SandboxConfig) -> str | None:
    return None if sandbox.token_file is None else Path(sandbox.token_file).read_text().strip()


async def _start_on_nodes(
    sandbox: SandboxConfig, nodes: Sequence[str], logs: Path, token: str, stack: AsyncExitStack
) -> list[str]:
    async def start(index: int, node: str) -> str:
        server = HostedServer(
            lambda: ExecutorServer(
                host=node_address(),
                token=token,
                workers=sandbox.workers,
                preload=sandbox.preload,
                memory_limit_bytes=sandbox.memory_limit_bytes,
                isolation=sandbox.isolation,
                min_isolation=sandbox.min_isolation,
                log_path=logs / f"executor{index}.log",
            ),
            node=node,
        )
        stack.push_async_callback(server.stop)
        return await server.start()

    return list(await asyncio.gather(*(start(*item) for item in enumerate(nodes))))


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
