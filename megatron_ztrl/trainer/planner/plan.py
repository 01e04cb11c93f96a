"""What a configuration takes: every world of ranks, the engines, a publish, and the time of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer.planner.activations import StageActivations, stage_activations
from megatron_ztrl.trainer.planner.engine import (
    EngineMemory,
    PublishBytes,
    engine_memory,
    publish_bytes,
)
from megatron_ztrl.trainer.planner.hardware import Hardware, Line
from megatron_ztrl.trainer.planner.states import StageStates, exact_states
from megatron_ztrl.trainer.planner.step_time import Workload, step_seconds, step_times
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.weights.hf_mapping import Architecture, Backend

States = Callable[[Config, WorldConfig, Architecture, bool], list[StageStates]]
"""(configuration, section, architecture, whether it is trained) -> states of each pipeline stage."""
Publish = Callable[[Config, Architecture], PublishBytes]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned for: a model, what it would run on, and what a step does."""

    model: str
    """Name to show."""
    policy: Architecture
    critic: Architecture
    """Unused where the configuration has none."""
    hardware: Hardware
    workload: Workload
    backend: Backend = "te"
    """Layers whose activations are counted."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One GPU of one pipeline stage; the largest of the stage where they differ."""

    stage: int
    states: StageStates
    activations: StageActivations | None
    """None for a world that is never trained."""
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        peak = self.activations.peak_bytes if self.activations else 0
        return self.states.total_bytes + peak + self.reserved_bytes


@dataclass(frozen=True, kw_only=True)
class WorldPlan:
    """``actor``, ``critic`` or ``reference``."""

    name: str
    gpus: int
    layout: str
    stages: list[StagePlan]

    @property
    def largest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.total_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that ``ztrl plan`` shows of one configuration."""

    config: Config
    subject: Subject
    worlds: list[WorldPlan]
    engine: EngineMemory
    publish: PublishBytes
    times: list[Line]
    problems: list[str]
    """Why it does not fit; empty if it does."""

    @property
    def engine_gpus(self) -> int:
        return self.config.engine.count * self.config.engine.tensor_parallel_size

    @property
    def gpus(self) -> int:
        return sum(world.gpus for world in self.worlds) + self.engine_gpus

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.config, self.times)


def make_plan(
    config: Config, subject: Subject, *, states: States = exact_states, publish: Publish = publish_bytes
) -> Plan:
    """Plans one configuration whose layouts fit the models.

    Args:
        config: The configuration.
        subject: What it is planned for.
        states: Counts states, for a search that wants a quicker count.
        publish: The same for a publish.

    Raises:
        ValueError: an option that the planner does not know, or an engine that cannot be cut so.
    """
    engine = engine_memory(config, subject.policy, subject.hardware)
    moved = publish(config, subject.policy)
    worlds = [
        _plan_world(name, config, world, shape, subject, states(config, world, shape, trained))
        for name, world, shape, trained in training_worlds(config, subject.policy, subject.critic)
    ]
    return Plan(
        config=config,
        subject=subject,
        worlds=worlds,
        engine=engine,
        publish=moved,
        times=step_times(config, subject.policy, subject.workload, engine, moved, subject.hardware),
        problems=_find_problems(worlds, engine, subject),
    )


def training_worlds(
    config: Config, policy: Architecture, critic: Architecture
) -> list[tuple[str, WorldConfig, Architecture, bool]]:
    """(name, layout, architecture, whether it is trained) of every Megatron world of the run."""
    worlds: list[tuple[str, WorldConfig, Architecture, bool]] = [("actor", config.actor, policy, True)]
    if config.algorithm.advantage == "gae":
        worlds.append(("critic", config.critic, replace(critic, head="value"), True))
    if config.algorithm.kl_coefficient and config.reference.placement == "world":
        worlds.append(("reference", config.actor, policy, False))
    return worlds


def describe(world: WorldConfig) -> str:
    """The layout, short."""
    parts = [f"TP {world.tensor_parallel_size}", f"PP {world.pipeline_parallel_size}"]
    if world.virtual_pipeline_size > 1:
        parts.append(f"VP {world.virtual_pipeline_size}")
    if world.context_parallel_size > 1:
        parts.append(f"CP {world.context_parallel_size}")
    return " ".join([*parts, f"DP {world.data_parallel_size}"])


def _plan_world(
    name: str,
    config: Config,
    world: WorldConfig,
    architecture: Architecture,
    subject: Subject,
    states: list[StageStates],
) -> WorldPlan:
    layout = parallel_layout(world)
    microbatches = subject.workload.microbatches(world)
    stages = [
        StagePlan(
            stage=stage,
            states=held,
            # A world that is not trained keeps no activations to speak of.
            activations=stage_activations(
                config, world, architecture, subject.backend, stage=stage, microbatches=microbatches
            )
            if held.gradient_bytes
            else None,
            reserved_bytes=round(subject.hardware.reserved_bytes),
        )
        for stage, held in enumerate(states)
    ]
    return WorldPlan(name=name, gpus=layout.world_size, layout=describe(world), stages=stages)


def _find_problems(worlds: Sequence[WorldPlan], engine: EngineMemory, subject: Subject) -> list[str]:
    """One line for everything that does not fit."""
    room = subject.hardware.memory_bytes
    problems = [
        f"{world.name}: a GPU of stage {world.largest.stage} needs {world.largest.total_bytes / 1e9:.1f} GB"
        f" of {room / 1e9:.0f} GB"
        for world in worlds
        if world.largest.total_bytes > room
    ]
    longest = subject.workload.longest_response_tokens + subject.workload.prompt_tokens
    if engine.kv_tokens < longest:
        problems.append(
            f"engine: its weights, {engine.weight_bytes / 1e9:.1f} GB a GPU, leave KV cache for"
            f" {max(0, engine.kv_tokens):,} tokens in {engine.mem_fraction:.0%} of {room / 1e9:.0f} GB, and one"
            f" rollout may need {longest:,.0f}"
        )
    return problems
