"""Brings up everything a run needs, and takes it all down again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ztrl.config.extensions import load_object
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.batches import Minibatch, PerToken, Scores
from megatron_ztrl.engines.server import reserve_engine_port
from megatron_ztrl.envs.base import Execute, MakeEnvironment
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.envs.python_tool import PythonTool
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.rewards.math_verifier import MathVerifier
from megatron_ztrl.rewards.own import bounded
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner, Score
from megatron_ztrl.rollout.trajectory import Sampling, Tokenizer
from megatron_ztrl.runtime.cluster import cluster_gpus, cluster_nodes, node_address, ray_cluster
from megatron_ztrl.runtime.engines import RunEngines
from megatron_ztrl.runtime.executors import RunExecutors, run_snippets
from megatron_ztrl.runtime.megatron_world import MegatronWorld, Role
from megatron_ztrl.runtime.processes import ProcessTable
from megatron_ztrl.runtime.scaling import follow_requests, with_standing_count
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.trainer.integrity import FileRecord
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.weights.publish import PublishReport, WeightPublisher


@dataclass(kw_only=True)
class RolloutSystem:
    """What rolling out needs: engines with the policy, executors, the verifier."""

    config: Config
    tokenizer: Tokenizer
    engines: RunEngines
    executors: RunExecutors
    execute: Execute
    verifier: MathVerifier
    processes: ProcessTable

    @property
    def fleet(self) -> EngineFleet:
        """Gives engines to rollouts."""
        return self.engines.fleet

    def group_runner(self, sampling: Sampling) -> GroupRunner:
        """Runs groups with this sampling (training and evaluation sample differently)."""
        return GroupRunner(
            fleet=self.fleet,
            tokenizer=self.tokenizer,
            execute=self.execute,
            score=self._score(),
            make_environment=self._make_environment(),
            template=get_template(self.config.data.prompt_template),
            tool=self.config.tool,
            sampling=sampling,
        )

    def _score(self) -> Score:
        own = self.config.reward.function
        return self.verifier.score if own is None else bounded(load_object(own, key="reward.function"), own)

    def _make_environment(self) -> MakeEnvironment:
        own = self.config.tool.environment
        return PythonTool.of if own is None else load_object(own, key="tool.environment")


@dataclass(kw_only=True)
class System:
    """A running system: what the training loop talks to."""

    rollouts: RolloutSystem
    actor: MegatronWorld
    critic: MegatronWorld | None
    reference: MegatronWorld | None
    """None without a KL term, and where the actor's ranks hold the first weights, too."""

    async def publish(self, version: int) -> PublishReport:
        """Brings every engine to the actor's weights; see `RunEngines.publish`.

        Raises:
            PublishError: The actor failed, or its weights must not reach an engine.
        """
        return await self.rollouts.engines.publish(version)

    async def while_engines_serve(self, work: Awaitable[None]) -> None:
        """Waits for ``work``, no longer than rollouts have engines; see `RunEngines.while_any_serves`."""
        await self.rollouts.engines.while_any_serves(work)

    async def scale_engines(self, count: int) -> None:
        """Makes it ``count`` engines, during the run; see `RunEngines.scale`."""
        await self.rollouts.engines.scale(count)

    async def scores(self, minibatch: Minibatch) -> Scores:
        """What every model says of the samples, all worlds at once."""
        algorithm = self.rollouts.config.algorithm
        calls: dict[str, Awaitable[PerToken]] = {}
        if algorithm.old_logprobs == "trainer":
            calls["old_logprobs"] = self.actor.logprobs(minibatch.actor)
        if self.reference is not None:
            calls["reference_logprobs"] = self.reference.logprobs(minibatch.actor)
        elif algorithm.kl_coefficient:
            calls["reference_logprobs"] = self.actor.reference_logprobs(minibatch.actor)
        if self.critic is not None and minibatch.critic is not None:
            calls["values"] = self.critic.values(minibatch.critic)
        return Scores(**dict(zip(calls, await asyncio.gather(*calls.values()), strict=True)))

    async def train_step(self, minibatch: Minibatch, step: int) -> dict[str, float]:
        """One optimizer step of actor and critic, side by side; the actor's waits out the critic's warm-up.

        Args:
            minibatch: With everything that ``with_targets`` attaches.
            step: Training steps done before this one.

        Returns:
            Statistics as ``loss/*`` and ``critic/*``.
        """
        await self.rollouts.engines.before_actor_changes()
        calls: dict[str, Awaitable[dict[str, float]]] = {}
        if self.critic is None or step >= self.rollouts.config.algorithm.critic_warmup_steps:
            calls["loss"] = self.actor.train_step(minibatch.actor, step)
        if self.critic is not None and minibatch.critic is not None:
            calls["critic"] = self.critic.train_step(minibatch.critic, step)
        results = await asyncio.gather(*calls.values())
        return {
            f"{world}/{name}": value
            for world, statistics in zip(calls, results, strict=True)
            for name, value in statistics.items()
        }

    async def save_checkpoint(self, directory: Path) -> None:
        """Begins to write ``actor/``, and ``critic/`` where there is one; training may go on meanwhile.

        Not before `RunEngines.verified`: a run that resumes from it goes on with tokens that engines sampled from
        these weights.
        """
        await self.rollouts.engines.verified()
        await asyncio.gather(
            *(world.save_checkpoint(directory / name) for name, world in self._trained().items())
        )

    async def checkpoint_written(self) -> bool:
        """Whether ``finish_checkpoint`` would return at once.

        Raises:
            OSError: The files could not be written.
        """
        return all(await asyncio.gather(*(world.checkpoint_written() for world in self._trained().values())))

    async def finish_checkpoint(self) -> dict[str, FileRecord]:
        """Waits for the files of ``save_checkpoint``. Returns their records by path."""
        worlds = self._trained()
        found = await asyncio.gather(*(world.finish_checkpoint() for world in worlds.values()))
        return {
            f"{name}/{file}": record
            for name, records in zip(worlds, found, strict=True)
            for file, record in records.items()
        }

    async def load_checkpoint(self, directory: Path) -> None:
        """Resumes from ``save_checkpoint``.

        Raises:
            ValueError: There is none, or it is of another model.
        """
        await asyncio.gather(
            *(world.load_checkpoint(directory / name) for name, world in self._trained().items())
        )

    def _trained(self) -> dict[str, MegatronWorld]:
        return {"actor": self.actor} | ({} if self.critic is None else {"critic": self.critic})


@contextlib.asynccontextmanager
async def launch_rollouts(
    config: Config, run_directory: Path, tokenizer: Tokenizer, progress: Progress
) -> AsyncIterator[RolloutSystem]:
    """Starts Ray, the engines and the executors, which serve the policy at ``model.path``."""
    async with contextlib.AsyncExitStack() as stack:
        with progress.startup("Ray"):
            stack.enter_context(ray_cluster())
        _check_ports_and_gpus(config, [])
        with progress.startup("SGLang engines and Python executors"):
            rollouts = await _start_rollouts(config, run_directory, tokenizer, progress, stack)
        await _supervise(rollouts, None, config.engine.count, progress, stack)
        yield rollouts


@contextlib.asynccontextmanager
async def launch(
    config: Config, run_directory: Path, tokenizer: Tokenizer, progress: Progress
) -> AsyncIterator[System]:
    """Starts Ray, the Megatron ranks, the engines and the executors, side by side.

    Args:
        config: The run.
        run_directory: Logs of the servers go to ``logs/`` in it.
        tokenizer: Of the policy.
        progress: The terminal.

    Raises:
        TrainerDied: A Megatron rank's process has ended, now or later.
    """
    configured_engines = config.engine.count
    config = with_standing_count(config, run_directory)
    roles = _roles(config)
    async with contextlib.AsyncExitStack() as stack:
        with progress.startup("Ray"):
            stack.enter_context(ray_cluster())
        _check_ports_and_gpus(config, roles)
        with progress.startup("Megatron ranks, SGLang engines and Python executors"):
            worlds = {role: MegatronWorld(config, role) for role in roles}
            for world in worlds.values():
                stack.callback(world.kill)
            rollouts, _ = await asyncio.gather(
                _start_rollouts(config, run_directory, tokenizer, progress, stack),
                asyncio.gather(*(world.build() for world in worlds.values())),
            )
        actor = worlds["actor"]
        publisher = WeightPublisher(
            config,
            actor,
            rollouts.engines.clients,
            address=node_address(),
            backend="nccl" if cluster_gpus() else "gloo",
        )
        stack.push_async_callback(publisher.close)
        supervisor = await _supervise(rollouts, publisher, configured_engines, progress, stack)
        for world in worlds.values():
            supervisor.spawn(world.watch())
        yield System(
            rollouts=rollouts,
            actor=actor,
            critic=worlds.get("critic"),
            reference=worlds.get("reference"),
        )


def _roles(config: Config) -> list[Role]:
    """The Megatron worlds of a run."""
    roles: list[Role] = ["actor"]
    if config.algorithm.advantage == "gae":
        roles.append("critic")
    if config.algorithm.kl_coefficient and config.reference.placement == "world":
        roles.append("reference")
    return roles


async def _start_rollouts(
    config: Config,
    run_directory: Path,
    tokenizer: Tokenizer,
    progress: Progress,
    stack: contextlib.AsyncExitStack,
) -> RolloutSystem:
    logs = run_directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    verifier = MathVerifier(config.reward)
    stack.callback(verifier.close)
    processes = ProcessTable(run_directory)
    stack.callback(processes.close)
    engines = RunEngines(config, logs, processes, progress.note)
    stack.push_async_callback(engines.stop)
    executors = RunExecutors(config, cluster_nodes(), logs, processes)
    stack.push_async_callback(executors.stop)
    _, pool = await asyncio.gather(engines.start(), executors.start())
    return RolloutSystem(
        config=config,
        tokenizer=tokenizer,
        engines=engines,
        executors=executors,
        execute=run_snippets(pool, run_timeout_seconds=config.tool.run_timeout_seconds),
        verifier=verifier,
        processes=processes,
    )


async def _supervise(
    rollouts: RolloutSystem,
    publisher: WeightPublisher | None,
    configured_engines: int,
    progress: Progress,
    stack: contextlib.AsyncExitStack,
) -> Supervisor:
    """Replaces servers that die from now on; entered last, so that nothing is replaced while all is taken down."""
    supervisor = await stack.enter_async_context(Supervisor(progress.note))
    rollouts.engines.supervise(supervisor, publisher)
    rollouts.executors.supervise(supervisor)
    directory = Path(rollouts.config.run.directory)
    supervisor.spawn(follow_requests(directory, configured_engines, rollouts.engines.scale, progress.note))
    return supervisor


def _check_ports_and_gpus(config: Config, roles: Sequence[Role]) -> None:
    """Finds a taken ``engine.port``, and GPUs that nobody has, before anything slow starts.

    On several nodes each engine finds a taken port by itself.

    Raises:
        ValueError: There is one, or there are too few.
    """
    if config.engine.port is not None and len(cluster_nodes()) == 1:
        for index in range(config.engine.count):
            reserve_engine_port(node_address(), config.engine.port + index).close()
    ranks = sum(
        parallel_layout(config.critic if role == "critic" else config.actor).world_size for role in roles
    )
    engine_gpus = config.engine.count * config.engine.tensor_parallel_size
    gpus = cluster_gpus()
    if gpus and ranks + engine_gpus > gpus:  # Ray would wait for more
        raise ValueError(
            f"the cluster has {gpus} GPUs: {ranks} Megatron ranks and {config.engine.count} engines of"
            f" {config.engine.tensor_parallel_size} need {ranks + engine_gpus}; see actor.*, critic.*, engine.*"
        )
