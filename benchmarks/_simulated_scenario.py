"""The machines and the work of the simulated 32B run, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from _simulated_engine import EngineTiming
from _simulated_policy import Workload

from megatron_ztrl.config import schema
from megatron_ztrl.types import RolloutGroup

MODEL = "qwen2.5-32b"
ENGINES, ENGINE_GPUS, RUNNING_REQUESTS, GROUP_SIZE = 32, 4, 64, 16
TENSOR_SIZE, PIPELINE_SIZE = 8, 4
"""Of the trainer."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The machines and the work."""

    workload: Workload
    timing: EngineTiming
    engines: int
    executor_workers: int
    groups_per_step: int
    group_size: int
    trainer_token_seconds: float
    """Of the whole trainer, log-probs included; prompt and tool tokens count."""
    publish_seconds: float
    refused_share: float = 0.0
    """Of groups, by the filter."""
    steps: int
    """That are measured, after as many as it takes to fill the pipeline."""

    def trainer_seconds(self, groups: Sequence[RolloutGroup]) -> float:
        """Log-probs and training of one step."""
        tokens = sum(len(r.prompt_ids) + len(r.token_ids) for group in groups for r in group.rollouts)
        return tokens * self.trainer_token_seconds


def planned_scenario(
    *, rollouts_in_flight: int, trainer_replicas: int, steps: int, seed: int, refused_share: float
) -> Scenario:
    """A 32B run on H100s, timed with the planner's numbers.

    Args:
        rollouts_in_flight: 64 to an engine.
        trainer_replicas: Data-parallel size of a trainer beside 32 engines; for others it is in proportion.
        steps: To measure.
        seed: Of the workload.
        refused_share: Of groups, by the filter.
    """
    from megatron_ztrl.trainer.planner.engine import PublishBytes, engine_memory
    from megatron_ztrl.trainer.planner.hardware import Hardware
    from megatron_ztrl.trainer.planner.models import PRESETS
    from megatron_ztrl.trainer.planner.step_time import Workload as PlannedWorkload
    from megatron_ztrl.trainer.planner.step_time import matmul_parameters, step_times
    from megatron_ztrl.weights.hf_mapping import Architecture

    workload = Workload(seed=seed)
    config = _planned_config(workload, trainer_replicas)
    hardware, architecture = Hardware(), Architecture.from_hf_config(PRESETS[MODEL])
    memory = engine_memory(config, architecture, hardware)
    received = memory.weight_bytes * ENGINES * ENGINE_GPUS
    publish = PublishBytes(
        total_bytes=received,
        largest_sent_bytes=received // (trainer_replicas * TENSOR_SIZE * PIPELINE_SIZE),
        largest_received_bytes=memory.weight_bytes,
    )
    planned = PlannedWorkload.of(
        config, prompt_tokens=workload.prompt_tokens, response_tokens=workload.median_response_tokens * 1.5
    )
    _, logprobs, training, transfer = step_times(config, architecture, planned, memory, publish, hardware)
    bandwidth = hardware.memory_bandwidth * hardware.decode_bandwidth_share
    all_reduces = 2 * architecture.num_layers * hardware.all_reduce_seconds
    flops = ENGINE_GPUS * hardware.flops * hardware.forward_flops_share
    engines = math.ceil(rollouts_in_flight / RUNNING_REQUESTS)
    return Scenario(
        workload=workload,
        timing=EngineTiming(
            step_seconds=memory.weight_bytes / bandwidth + hardware.decode_overhead_seconds + all_reduces,
            sequence_seconds=0.0,  # computing is faster than reading up to some 200 sequences
            context_token_seconds=memory.kv_bytes_per_token / bandwidth,
            prefill_token_seconds=2 * matmul_parameters(architecture) / flops,
            max_running_requests=RUNNING_REQUESTS,
        ),
        engines=engines,
        executor_workers=8 * engines,
        groups_per_step=engines * RUNNING_REQUESTS // GROUP_SIZE,
        group_size=GROUP_SIZE,
        trainer_token_seconds=(logprobs.amount + training.amount) / planned.tokens * ENGINES / engines,
        publish_seconds=transfer.amount,
        refused_share=refused_share,
        steps=steps,
    )


def _planned_config(workload: Workload, trainer_replicas: int) -> schema.Config:
    return schema.Config(
        run=schema.RunConfig(directory="."),
        model=schema.ModelConfig(path=MODEL),
        data=schema.DataConfig(train=schema.DatasetConfig(name="simulated", path="simulated")),
        train=schema.TrainConfig(num_steps=1),
        rollout=schema.RolloutConfig(
            groups_per_step=ENGINES * RUNNING_REQUESTS // GROUP_SIZE,
            group_size=GROUP_SIZE,
            max_response_tokens=workload.max_response_tokens,
        ),
        actor=schema.ActorConfig(
            tensor_parallel_size=TENSOR_SIZE,
            pipeline_parallel_size=PIPELINE_SIZE,
            data_parallel_size=trainer_replicas,
            sequence_parallel=True,
            max_tokens_per_microbatch=workload.max_response_tokens + workload.prompt_tokens,
        ),
        engine=schema.EngineConfig(
            count=ENGINES, tensor_parallel_size=ENGINE_GPUS, max_running_requests=RUNNING_REQUESTS
        ),
    )


def shared_gpus(scenario: Scenario, trainer_replicas: int) -> Scenario:
    """The same GPUs, all of them for generation and for training in turn."""
    trainer_gpus = trainer_replicas * TENSOR_SIZE * PIPELINE_SIZE
    share = trainer_gpus / (trainer_gpus + ENGINES * ENGINE_GPUS)
    return replace(
        scenario,
        engines=round(scenario.engines / (1 - share)),
        trainer_token_seconds=scenario.trainer_token_seconds * share,
    )


def generation_bound_seconds(scenario: Scenario, groups: Sequence[RolloutGroup]) -> float:
    """The least time for these groups, and those refused beside them: full batches, no prefix computed twice."""
    timing = scenario.timing
    sampled = context = 0
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        for turn in rollout.turns:
            tokens = turn.tool_start - turn.start
            sampled += tokens
            context += tokens * (2 * len(rollout.prompt_ids) + turn.start + turn.tool_start) // 2
    batch = timing.max_running_requests
    decode_seconds = sampled / batch * timing.decode_step_seconds(batch, batch * context / sampled)
    prefill_seconds = sum(needed_prefill(group) for group in groups) * timing.prefill_token_seconds
    return (decode_seconds + prefill_seconds) / scenario.engines / (1 - scenario.refused_share)


def needed_prefill(group: RolloutGroup) -> int:
    """Tokens that some engine has to read: the prompt once, and the tool replies that are followed by something."""
    replies = sum(turn.end - turn.tool_start for rollout in group.rollouts for turn in rollout.turns)
    return len(group.rollouts[0].prompt_ids) + replies
