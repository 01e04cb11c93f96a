"""The numbers an estimate rests on, and the form in which it shows its working. Change any and plan again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and the network between its nodes. The defaults are an H100 SXM on 400 Gb/s per GPU."""

    name: str = "H100 SXM 80 GB"
    gpus_per_node: int = 8
    memory_bytes: float = 80e9
    reserved_bytes: float = 4e9
    """CUDA context, NCCL's buffers, workspaces, fragmentation: an allowance, not a prediction."""
    flops: float = 989e12
    """Dense bfloat16, per second."""
    memory_bandwidth: float = 3.35e12
    """Bytes per second, as are the next two."""
    nvlink_bandwidth: float = 450e9
    """In each direction."""
    nic_bandwidth: float = 50e9
    """Of each GPU's own network card."""

    # What is reached of the peaks above. Assumptions: replace them with what your cluster measures.
    training_flops_share: float = 0.40
    """Model FLOPs utilisation of forward and backward, communication not counted."""
    forward_flops_share: float = 0.45
    decode_bandwidth_share: float = 0.60
    network_share: float = 0.70
    decode_overhead_seconds: float = 1e-3
    """Of one decode step: scheduling, sampling, launching."""
    all_reduce_seconds: float = 15e-6
    """Latency of one small all-reduce inside an engine."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure, and how it comes about."""

    name: str
    amount: float
    unit: Literal["bytes", "seconds", "tokens"]
    working: str
