"""Brings up everything a run needs, and takes it all down again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.envs.python_tool import Execute
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.rewards.math_verifier import MathVerifier
from megatron_ztrl.rollout.group import EngineFleet, GroupRunner
from megatron_ztrl.rollout.trajectory import Sampling, Tokenizer
from megatron_ztrl.runtime.cluster import cluster_gpus, cluster_nodes, node_address, ray_cluster
from megatron_ztrl.runtime.executors import run_snippets, start_executors
from megatron_ztrl.runtime.megatron_world import MegatronWorld
from megatron_ztrl.runtime.services import Engine, HostedServer
from megatron_ztrl.weights.publish import WeightPublisher


@dataclass(kw_only=True)
class RolloutSystem:
    """What rolling out needs: engines with the policy, executors, the verifier."""

    config: Config
    tokenizer: Tokenizer
    engines: list[EngineClient]
    fleet: EngineFleet
    execute: Execute
    verifier: MathVerifier

    def group_runner(self, sampling: Sampling) -> GroupRunner:
        """Runs groups with this sampling (training and evaluation sample differently)."""
        return GroupRunner(
            fleet=self.fleet,
            tokenizer=self.tokenizer,
            execute=self.execute,
            score=self.verifier.score,
            template=get_template(self.config.data.prompt_template),
            tool=self.config.tool,
            sampling=sampling,
        )


@dataclass(kw_only=True)
class System:
    """A running system: what the training loop talks to."""

    rollouts: RolloutSystem
    actor: MegatronWorld
    publisher: WeightPublisher


@contextlib.asynccontextmanager
async def launch_rollouts(
    config: Config, run_directory: Path, tokenizer: Tokenizer, progress: Progress
) -> AsyncIterator[RolloutSystem]:
    """Starts Ray, the engines and the executors, which serve the policy at ``model.path``."""
    async with contextlib.AsyncExitStack() as stack:
        with progress.startup("Ray"):
            stack.enter_context(ray_cluster())
        with progress.startup("SGLang engines and Python executors"):
            rollouts = await _start_rollouts(config, run_directory, tokenizer, stack)
        yield rollouts


@contextlib.asynccontextmanager
async def launch(
    config: Config, run_directory: Path, tokenizer: Tokenizer, progress: Progress
) -> AsyncIterator[System]:
    """Starts Ray, the actor's ranks, the engines and the executors, side by side.

    Args:
        config: The run.
        run_directory: Logs of the servers go to ``logs/`` in it.
        tokenizer: Of the policy.
        progress: The terminal.
    """
    async with contextlib.AsyncExitStack() as stack:
        with progress.startup("Ray"):
            stack.enter_context(ray_cluster())
        with progress.startup("Megatron ranks, SGLang engines and Python executors"):
            actor = MegatronWorld(config)
            stack.callback(actor.kill)
            rollouts, _ = await asyncio.gather(
                _start_rollouts(config, run_directory, tokenizer, stack), actor.build()
            )
        publisher = WeightPublisher(
            config,
            actor,
            rollouts.engines,
            address=node_address(),
            backend="nccl" if cluster_gpus() else "gloo",
        )
        stack.push_async_callback(publisher.close)
        yield System(rollouts=rollouts, actor=actor, publisher=publisher)


async def _start_rollouts(
    config: Config, run_directory: Path, tokenizer: Tokenizer, stack: contextlib.AsyncExitStack
) -> RolloutSystem:
    logs = run_directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    verifier = MathVerifier(config.reward)
    stack.callback(verifier.close)
    engines, executors = await asyncio.gather(
        _start_engines(config, logs, stack), start_executors(config, cluster_nodes(), logs, stack)
    )
    return RolloutSystem(
        config=config,
        tokenizer=tokenizer,
        engines=engines,
        fleet=EngineFleet(engines, max_concurrent_per_engine=config.engine.max_running_requests),
        execute=run_snippets(executors, run_timeout_seconds=config.tool.run_timeout_seconds),
        verifier=verifier,
    )


async def _start_engines(config: Config, logs: Path, stack: contextlib.AsyncExitStack) -> list[EngineClient]:
    async def start(index: int) -> EngineClient:
        log_path = logs / f"engine{index}.log"
        server = HostedServer(
            lambda: Engine(EngineServer(config, index=index, log_path=log_path, host=node_address())),
            gpus=config.engine.tensor_parallel_size,
        )
        stack.push_async_callback(server.stop)
        client = EngineClient(
            await server.start(), request_timeout_seconds=config.engine.request_timeout_seconds
        )
        stack.push_async_callback(client.close)
        return client

    return list(await asyncio.gather(*(start(index) for index in range(config.engine.count))))
