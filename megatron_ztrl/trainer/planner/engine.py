"""What an engine's GPUs hold, and what a publish moves: arithmetic on the slices that are really sent."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.parameters import VOCABULARY_MULTIPLE, engine_slices
from megatron_ztrl.trainer.planner.hardware import Hardware
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)
from megatron_ztrl.weights.reshard import plan

DEFAULT_MEM_FRACTION = 0.85
"""Where ``sglang.server_args.mem_fraction_static`` is not set: SGLang then works it out from the GPU."""
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Of one GPU of one engine; all its GPUs are alike but for vocabulary padding."""

    weight_bytes: int
    kv_bytes_per_token: int
    mem_fraction: float
    """Share of the GPU that weights and KV cache fill together."""
    kv_tokens: int
    """Tokens that the cache of the engine holds; negative when not even the weights fit."""
    demanded_tokens: int
    """``engine.max_running_requests`` sequences of the greatest length."""

    @property
    def kv_bytes(self) -> int:
        return max(0, self.kv_tokens) * self.kv_bytes_per_token


def engine_memory(config: Config, architecture: Architecture, hardware: Hardware) -> EngineMemory:
    """Weights and KV cache.

    Raises:
        ValueError: the heads do not divide among the engine's GPUs.
    """
    size, a = config.engine.tensor_parallel_size, architecture
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    weight_bytes = dtype_bytes * engine_parameters(architecture, size)
    per_token = 2 * a.num_layers * a.num_kv_groups * a.head_size // size * dtype_bytes
    fraction = float(config.sglang.server_args.get("mem_fraction_static") or DEFAULT_MEM_FRACTION)
    return EngineMemory(
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        mem_fraction=fraction,
        kv_tokens=math.floor((hardware.memory_bytes * fraction - weight_bytes) / per_token),
        demanded_tokens=config.engine.max_running_requests
        * (config.data.max_prompt_tokens + config.rollout.max_response_tokens),
    )


@functools.cache
def engine_parameters(architecture: Architecture, size: int) -> int:
    """Parameters of one engine GPU, with the vocabulary's padding."""
    rows = _row_sizes(architecture)
    held = sum(_elements(piece, rows) for piece in engine_slices(_hf_config(architecture), size, 0))
    # Rank 0 of several has no padding: that lies at the vocabulary's end.
    padding = -architecture.vocab_size % VOCABULARY_MULTIPLE if size == 1 else 0
    return held + (1 if architecture.tied_embeddings else 2) * padding * architecture.hidden_size


@dataclass(frozen=True, kw_only=True)
class PublishBytes:
    """What one publish moves."""

    total_bytes: int
    largest_sent_bytes: int
    """By the actor rank that sends most; engines that feed others send what they receive."""
    largest_received_bytes: int
    """By the engine GPU that receives most."""


def publish_bytes(config: Config, architecture: Architecture) -> PublishBytes:
    """Sums over the very plan that the publisher follows."""
    layout, size = parallel_layout(config.actor), config.engine.tensor_parallel_size
    senders = [megatron_slices(architecture, layout, rank, backend="te") for rank in range(layout.world_size)]
    engine = [engine_slices(_hf_config(architecture), size, rank) for rank in range(size)]
    published = plan(senders, engine, config.engine.count, hf_tensor_shapes(architecture))
    sent, received = [0] * len(senders), [0] * size * len(published.chains)
    for item in published.transfers:
        sent[item.source] += item.elements
        received[item.target] += item.elements
    dtype_bytes = DTYPE_BYTES[config.model.dtype]
    return PublishBytes(
        total_bytes=sum(received[:size]) * config.engine.count * dtype_bytes,
        largest_sent_bytes=max(sent) * dtype_bytes,
        largest_received_bytes=max(received) * dtype_bytes,
    )


def rank_parameters(architecture: Architecture, tensor_size: int, pipeline_size: int, stage: int) -> int:
    """Parameters of a stage's first tensor-parallel rank, vocabulary padding aside."""
    layout = ParallelLayout(tensor_size=tensor_size, pipeline_size=pipeline_size)
    rows = _row_sizes(architecture)
    return sum(
        _elements(piece, rows)
        for piece in megatron_slices(architecture, layout, stage * tensor_size, backend="te")
    )


def _elements(piece: TensorSlice, rows: Mapping[tuple[str, int], int]) -> int:
    return piece.length * rows[piece.tensor, piece.dim]


def _hf_config(architecture: Architecture) -> dict[str, Any]:
    """What the engines' side reads of config.json."""
    a = architecture
    return {
        "architectures": [f"{a.family}ForCausalLM"],
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_size,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_groups,
        "head_dim": a.head_size,
        "vocab_size": a.vocab_size,
        "tie_word_embeddings": a.tied_embeddings,
    }


@functools.cache
def _row_sizes(architecture: Architecture) -> dict[tuple[str, int], int]:
    """Elements of one row of each HF tensor, by the dimension along which it is cut."""
    return {
        (name, dim): math.prod(shape) // shape[dim]
        for name, shape in hf_tensor_shapes(architecture).items()
        for dim in range(len(shape))
    }
