"""How long a training step would take, from stated hardware numbers. An estimate to compare layouts with.

Left out: tool calls and rewards, stragglers beyond the longest response, pipeline messages, overlap of
communication with computation, and the driver.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer.planner.engine import DTYPE_BYTES, EngineMemory, PublishBytes
from megatron_ztrl.trainer.planner.hardware import Hardware, Line
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.weights.hf_mapping import Architecture, hf_tensor_shapes

MAIN_GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one training step generates and trains."""

    samples: int
    groups: int
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean, tool replies included."""
    longest_response_tokens: int
    minibatches: int

    @classmethod
    def of(cls, config: Config, *, prompt_tokens: float | None, response_tokens: float | None) -> Workload:
        """From the configuration; where no mean is given, a quarter of the longest prompt, half of a response."""
        rollout = config.rollout
        return cls(
            samples=rollout.groups_per_step * rollout.group_size,
            groups=rollout.groups_per_step,
            prompt_tokens=config.data.max_prompt_tokens / 4 if prompt_tokens is None else prompt_tokens,
            response_tokens=rollout.max_response_tokens / 2 if response_tokens is None else response_tokens,
            longest_response_tokens=rollout.max_response_tokens,
            minibatches=config.algorithm.minibatches,
        )

    @property
    def sequence_tokens(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> float:
        return self.samples * self.sequence_tokens

    def microbatches(self, world: WorldConfig) -> int:
        """Of one data-parallel replica in one optimizer step."""
        tokens = self.tokens / self.minibatches / world.data_parallel_size
        return max(1, math.ceil(tokens / world.max_tokens_per_microbatch))


def step_seconds(config: Config, times: list[Line]) -> float:
    """The phases one after the other, or generation beside training when rollouts may be stale."""
    generation, logprobs, training, publish = (line.amount for line in times)
    if config.rollout.max_staleness:
        return max(generation, logprobs + training) + publish
    return generation + logprobs + training + publish


def step_times(
    config: Config,
    architecture: Architecture,
    workload: Workload,
    engine: EngineMemory,
    publish: PublishBytes,
    hardware: Hardware,
) -> list[Line]:
    """Generation, log-probs, training and publish, in this order."""
    passes = config.algorithm.old_logprobs == "trainer", config.algorithm.kl_coefficient > 0
    return [
        _generation(config, architecture, workload, engine, hardware),
        _trainer_pass(config, architecture, workload, hardware, forward_passes=sum(passes)),
        _training(config, architecture, workload, hardware),
        _publish(publish, hardware),
    ]


@functools.cache
def matmul_parameters(architecture: Architecture) -> int:
    """Parameters that multiply every token: all but an embedding that is only looked up."""
    shapes = hf_tensor_shapes(architecture)
    total = sum(math.prod(shape) for shape in shapes.values())
    return total - (0 if architecture.tied_embeddings else math.prod(shapes["model.embed_tokens.weight"]))


def _generation(
    config: Config, architecture: Architecture, workload: Workload, engine: EngineMemory, hardware: Hardware
) -> Line:
    size, count = config.engine.tensor_parallel_size, config.engine.count
    share = math.ceil(workload.samples / count)
    context = workload.prompt_tokens + workload.response_tokens / 2
    room = max(1, math.floor(engine.kv_tokens / workload.sequence_tokens))
    batch = min(config.engine.max_running_requests, share, room)
    bandwidth = hardware.memory_bandwidth * hardware.decode_bandwidth_share
    overhead = hardware.decode_overhead_seconds
    if size > 1:
        overhead += 2 * architecture.num_layers * hardware.all_reduce_seconds

    def decode_seconds(sequences: float) -> float:
        read = engine.weight_bytes + sequences * context * engine.kv_bytes_per_token
        computed = 2 * matmul_parameters(architecture) * sequences / size
        return max(read / bandwidth, computed / (hardware.flops * hardware.forward_flops_share)) + overhead

    steady = share * workload.response_tokens / batch * decode_seconds(batch)
    longest = workload.longest_response_tokens * decode_seconds(1)
    prefill = (
        2
        * matmul_parameters(architecture)
        * workload.groups
        * workload.prompt_tokens
        / (size * count * hardware.flops * hardware.forward_flops_share)
    )
    return Line(
        name="generation",
        amount=max(steady, longest) + prefill,
        unit="seconds",
        working=(
            f"{share} rollouts per engine, {batch} at a time, × {workload.response_tokens:.0f} tokens;"
            f" one step reads weights and KV of {context:.0f} tokens each at {bandwidth / 1e12:.2f} TB/s and costs"
            f" {overhead * 1e3:.1f} ms besides = {decode_seconds(batch) * 1e3:.1f} ms; at least"
            f" {longest:.0f} s for the longest response; prefill {prefill:.1f} s, siblings share the prompt's"
        ),
    )


def _trainer_pass(
    config: Config,
    architecture: Architecture,
    workload: Workload,
    hardware: Hardware,
    *,
    forward_passes: int,
) -> Line:
    per_token = _forward_flops(architecture, workload)
    gpus = parallel_layout(config.actor).world_size
    compute = per_token * workload.tokens / (gpus * hardware.flops * hardware.forward_flops_share)
    bubble = _bubble(config, workload)
    # Two gathers and two scatters per layer.
    tensor = _tensor_parallel_seconds(config, architecture, workload, hardware, exchanges=4)
    seconds = forward_passes * (compute * bubble + tensor)
    return Line(
        name="log-probs",
        amount=seconds,
        unit="seconds",
        working=(
            f"{forward_passes} forward pass(es): {workload.tokens:,.0f} tokens × {per_token / 1e9:.1f} GFLOP"
            f" / ({gpus} GPUs × {hardware.flops * hardware.forward_flops_share / 1e12:.0f} TFLOP/s)"
            f" = {compute:.1f} s × {bubble:.2f} pipeline bubble + {tensor:.1f} s tensor-parallel exchange"
        ),
    )


def _training(config: Config, architecture: Architecture, workload: Workload, hardware: Hardware) -> Line:
    recomputes = config.megatron.transformer.get("recompute_granularity") == "full"
    forwards = 4 if recomputes else 3
    per_token = forwards * _forward_flops(architecture, workload)
    layout = parallel_layout(config.actor)
    compute = (
        per_token * workload.tokens / (layout.world_size * hardware.flops * hardware.training_flops_share)
    )
    bubble = _bubble(config, workload)
    # Forward as above; backward gathers once more, for the weights' gradients.
    tensor = _tensor_parallel_seconds(
        config, architecture, workload, hardware, exchanges=14 if recomputes else 10
    )
    in_node = layout.tensor_size * layout.replicas <= hardware.gpus_per_node
    network = hardware.nvlink_bandwidth if in_node else hardware.nic_bandwidth
    held = matmul_parameters(architecture) / (layout.tensor_size * layout.pipeline_size)
    moved = held * (MAIN_GRADIENT_BYTES + DTYPE_BYTES[config.model.dtype])
    moved *= (layout.replicas - 1) / layout.replicas * workload.minibatches
    data = moved / (network * hardware.network_share)
    return Line(
        name="training",
        amount=compute * bubble + tensor + data,
        unit="seconds",
        working=(
            f"{forwards} × forward FLOPs ({'forward, recomputation' if recomputes else 'forward'}, 2 × backward):"
            f" {workload.tokens:,.0f} tokens × {per_token / 1e9:.1f} GFLOP / ({layout.world_size} GPUs ×"
            f" {hardware.flops * hardware.training_flops_share / 1e12:.0f} TFLOP/s) = {compute:.1f} s ×"
            f" {bubble:.2f} bubble ({workload.microbatches(config.actor)} microbatches) + {tensor:.1f} s"
            f" tensor-parallel exchange + {data:.1f} s gradients and weights over"
            f" {'NVLink' if in_node else 'the network'}"
        ),
    )


def _publish(publish: PublishBytes, hardware: Hardware) -> Line:
    rate = hardware.nic_bandwidth * hardware.network_share
    largest = max(publish.largest_sent_bytes, publish.largest_received_bytes)
    return Line(
        name="publish",
        amount=largest / rate,
        unit="seconds",
        working=(
            f"all ranks at once: the busiest sends {publish.largest_sent_bytes / 1e9:.2f} GB, the fullest receives"
            f" {publish.largest_received_bytes / 1e9:.2f} GB, at {rate / 1e9:.0f} GB/s"
        ),
    )


def _forward_flops(architecture: Architecture, workload: Workload) -> float:
    """Per token: 2 for each parameter, and causal attention over half the sequence (arXiv:2104.04473, section 3)."""
    attention = (
        2
        * architecture.num_layers
        * architecture.num_heads
        * architecture.head_size
        * workload.sequence_tokens
    )
    return 2 * matmul_parameters(architecture) + attention


def _bubble(config: Config, workload: Workload) -> float:
    """Time with the pipeline's idle start and end, over time without."""
    world = config.actor
    idle = (world.pipeline_parallel_size - 1) / world.virtual_pipeline_size
    return 1 + idle / workload.microbatches(config.actor)


def _tensor_parallel_seconds(
    config: Config, architecture: Architecture, workload: Workload, hardware: Hardware, *, exchanges: int
) -> float:
    """Every exchange moves all hidden states of a microbatch but a rank's own part of them."""
    layout = parallel_layout(config.actor)
    if layout.tensor_size == 1:
        return 0.0
    tokens = workload.tokens / layout.replicas
    row = architecture.hidden_size * DTYPE_BYTES[config.model.dtype]
    layers = architecture.num_layers / layout.pipeline_size
    moved = exchanges * layers * tokens * row * (layout.tensor_size - 1) / layout.tensor_size
    return moved / (hardware.nvlink_bandwidth * hardware.network_share)
