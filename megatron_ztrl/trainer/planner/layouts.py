"""The search for the best layout of so many GPUs: everything that fits, ranked by the estimated step time.

Candidates are compared with states counted from slices, which lack only Megatron's padding; those that are
shown have been counted exactly.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer.planner.engine import (
    DTYPE_BYTES,
    PublishBytes,
    engine_parameters,
    rank_parameters,
)
from megatron_ztrl.trainer.planner.plan import Plan, Subject, make_plan, training_worlds
from megatron_ztrl.trainer.planner.states import MAIN_WEIGHT_BYTES, MOMENT_BYTES, StageStates
from megatron_ztrl.trainer.planner.step_time import MAIN_GRADIENT_BYTES
from megatron_ztrl.trainer.topology import check_world, parallel_layout
from megatron_ztrl.weights.hf_mapping import Architecture

TENSOR_SIZES = (1, 2, 4, 8)
"""Tensor parallelism stays inside a node."""
MAX_PIPELINE_SIZE = 16
FULL_RECOMPUTATION: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
ENGINE_SHARES = 16
"""Engines get a multiple of so manieth of the GPUs."""
NODES_TRIED = 128


def suggest(config: Config, subject: Subject, gpus: int, count: int) -> list[Plan]:
    """The quickest layouts of at most ``gpus`` GPUs, exactly counted; empty if none fits."""
    fitting = (plan for plan in _candidates(config, subject, gpus) if not plan.problems)
    best = heapq.nsmallest(2 * count, fitting, key=lambda plan: (plan.step_seconds, plan.gpus))
    # The exact publish plan of hundreds of GPUs takes longer than all the rest, and moves the same bytes.
    exact = (make_plan(plan.config, subject, publish=_even_publish) for plan in best)
    return [plan for plan in exact if not plan.problems][:count]


def least_gpus(config: Config, subject: Subject) -> int | None:
    """The smallest number of GPUs, in whole nodes, on which some layout fits; None if none of those tried."""
    node = subject.hardware.gpus_per_node
    for nodes in range(1, NODES_TRIED + 1):
        if any(not plan.problems for plan in _candidates(config, subject, nodes * node)):
            return nodes * node
    return None


def _candidates(config: Config, subject: Subject, gpus: int) -> Iterator[Plan]:
    """Every way to divide the GPUs, whether it fits or not."""
    worlds = len(training_worlds(config, subject.policy, subject.critic))
    for engine_size in TENSOR_SIZES:
        if subject.policy.num_kv_groups % engine_size or subject.policy.num_heads % engine_size:
            continue
        stride = max(engine_size, gpus // ENGINE_SHARES // engine_size * engine_size)
        for engine_gpus in range(stride, gpus, stride):
            with_engines = replace(
                config,
                engine=replace(
                    config.engine, count=engine_gpus // engine_size, tensor_parallel_size=engine_size
                ),
            )
            for world_config in _worlds(with_engines, subject, (gpus - engine_gpus) // worlds):
                yield make_plan(world_config, subject, states=_counted_states, publish=_even_publish)


def _worlds(config: Config, subject: Subject, gpus: int) -> Iterator[Config]:
    """Layouts of the training worlds, each of at most ``gpus`` ranks, with and without recomputation."""
    given = {k: v for k, v in config.megatron.transformer.items() if not k.startswith("recompute_")}
    for tensor_size in TENSOR_SIZES:
        for pipeline_size in range(1, MAX_PIPELINE_SIZE + 1):
            data_size = min(gpus // (tensor_size * pipeline_size), subject.workload.samples)
            layout: dict[str, Any] = {
                "tensor_parallel_size": tensor_size,
                "pipeline_parallel_size": pipeline_size,
                "virtual_pipeline_size": 1,
                "data_parallel_size": data_size,
                "context_parallel_size": 1,
                "sequence_parallel": tensor_size > 1,
            }
            actor, critic = replace(config.actor, **layout), replace(config.critic, **layout)
            if data_size == 0 or not _can_be_cut(actor, subject.policy):
                continue
            if config.algorithm.advantage == "gae" and not _can_be_cut(critic, subject.critic):
                continue
            for recompute in ({}, FULL_RECOMPUTATION):
                megatron = replace(config.megatron, transformer=given | recompute)
                yield replace(config, actor=actor, critic=critic, megatron=megatron)


def _can_be_cut(world: WorldConfig, architecture: Architecture) -> bool:
    try:
        check_world("actor", world, architecture)
    except ValueError:
        return False
    return True


def _counted_states(
    config: Config, world: WorldConfig, architecture: Architecture, trained: bool
) -> list[StageStates]:
    """Like ``exact_states``, without padding, and without building anything."""
    layout = parallel_layout(world)
    weight = DTYPE_BYTES[config.model.dtype]
    state = MOMENT_BYTES + (MAIN_WEIGHT_BYTES if config.model.dtype == "bfloat16" else 0)
    counts = _stage_parameters(architecture, layout.tensor_size, layout.pipeline_size)
    return [
        StageStates(
            parameters=count,
            weight_bytes=weight * count,
            gradient_bytes=MAIN_GRADIENT_BYTES * count if trained else 0,
            optimizer_bytes_by_data_rank=(-(-state * count // layout.replicas) if trained else 0,),
        )
        for count in counts
    ]


@functools.cache
def _stage_parameters(architecture: Architecture, tensor_size: int, pipeline_size: int) -> list[int]:
    return [
        rank_parameters(architecture, tensor_size, pipeline_size, stage) for stage in range(pipeline_size)
    ]


def _even_publish(config: Config, architecture: Architecture) -> PublishBytes:
    """Like ``publish_bytes``, if all ranks sent alike."""
    size = config.engine.tensor_parallel_size
    received = engine_parameters(architecture, size) * DTYPE_BYTES[config.model.dtype]
    layout = parallel_layout(config.actor)
    fed = min(config.engine.count, layout.replicas)  # the others get it from their neighbour
    return PublishBytes(
        total_bytes=received * size * config.engine.count,
        largest_sent_bytes=received * size * fed // layout.world_size,
        largest_received_bytes=received,
    )
