"""Resumable state with Megatron's distributed checkpoint, in the format that any later layout can read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer

from megatron_ztrl.trainer.model import PolicyModel
from megatron_ztrl.trainer.shard_writer import BackgroundSave, PendingSave
from megatron_ztrl.weights.hf_mapping import ParallelLayout

SHARD_INDEX = ".metadata"
"""Which shard is where in which file; the last file that is written."""


def save(
    directory: Path, chunks: list[PolicyModel], optimizer: MegatronOptimizer, layout: ParallelLayout
) -> PendingSave:
    """Begins to save parameters, optimizer state and random state; collective over all ranks.

    Returns when everything has been copied, so that training may go on while the copies are written.
    """
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    _give_every_parameter_adam_state(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["layout"] = _layout_record(layout)
    state["rng"] = _sharded_rng(layout, _rng_state())
    strategy = BackgroundSave("torch_dist", 1)
    dist_checkpointing.save(state, str(directory), sharded_strategy=strategy)
    return strategy.pending


def load(
    directory: Path, chunks: list[PolicyModel], optimizer: MegatronOptimizer, layout: ParallelLayout
) -> None:
    """Restores what :func:`save` wrote, under the same or another layout; collective over all ranks.

    The random state is restored only under the same layout. No dropout draws from it.

    Raises:
        ValueError: there is no complete checkpoint in ``directory``, or it lacks a parameter.
    """
    if not (directory / SHARD_INDEX).is_file():
        raise ValueError(f"{directory} holds no complete Megatron checkpoint ({SHARD_INDEX} is missing)")
    _give_every_parameter_adam_state(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    same_layout = dist_checkpointing.load_common_state_dict(str(directory))["layout"] == _layout_record(
        layout
    )
    if same_layout:
        state["rng"] = _sharded_rng(layout, None)
    loaded = dist_checkpointing.load(state, str(directory))
    for index, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[_chunk_key(index, chunks)], strict=False)
        # Transformer Engine's modules have extra state (FP8 scales) that the local layers lack.
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise ValueError(f"{directory}: missing {missing}, unexpected {result.unexpected_keys}")
    _load_optimizer(optimizer, loaded["optimizer"])
    if same_layout:
        _restore_rng(loaded["rng"])


def _sharded_state(
    chunks: list[PolicyModel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        _chunk_key(index, chunks): chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    model_state = state if len(chunks) > 1 else state["model"]
    with _bucket_padding_kept(optimizer):
        optimizer_state = optimizer.sharded_state_dict(
            dict(model_state), is_loading=is_loading, metadata=metadata
        )
    return {**state, "optimizer": optimizer_state}


@contextlib.contextmanager
def _bucket_padding_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Makes Megatron 0.16 save the right numbers when a gradient buffer has several buckets.

    It joins the buckets without the padding between them, then cuts parameters out at positions that count
    the padding: everything behind the first bucket is shifted, and the end filled with zeros. Tied embeddings
    under pipeline parallelism make a bucket of their own, overlapped reduction makes many.
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in getattr(part, "buffers", [])]
    holders = [holder for buffer in buffers for holder in (buffer, *buffer.buckets)]
    unpadded = [holder.numel_unpadded for holder in holders]
    for holder in holders:
        holder.numel_unpadded = holder.grad_data.numel()
    try:
        yield
    finally:
        for holder, size in zip(holders, unpadded, strict=True):
            holder.numel_unpadded = size


def _chunk_key(index: int, chunks: list[PolicyModel]) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def _layout_record(layout: ParallelLayout) -> dict[str, int]:
    return {"tensor": layout.tensor_size, "pipeline": layout.pipeline_size, "data": layout.data_size}


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _uses_torch_adam(part: Any) -> bool:
    """Without Transformer Engine and apex, Megatron takes torch's Adam, which keeps ``step`` tensors."""
    return isinstance(part.optimizer, torch.optim.Optimizer) and type(part.optimizer).__module__.startswith(
        "torch."
    )


def _give_every_parameter_adam_state(optimizer: MegatronOptimizer) -> None:
    """Torch's Adam makes its state in the first step, but Megatron reads a ``step`` from every parameter."""
    for part in _parts(optimizer):
        if not _uses_torch_adam(part):
            continue
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            if not part.optimizer.state[parameter]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Loads optimizer state, around two defects of Megatron 0.16 with torch's Adam."""
    for part in filter(_uses_torch_adam, _parts(optimizer)):
        # The resharded state has no "step" (it is in the parameter groups), but the setter asks for one.
        part._set_main_param_and_optimizer_states = _KeepStep(part)
    optimizer.load_state_dict(state)
    for part in filter(_uses_torch_adam, _parts(optimizer)):
        del part._set_main_param_and_optimizer_states
        # All parameters share one step tensor now, which each of them would advance in every step.
        for parameter_state in part.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()


class _KeepStep:
    """Replaces a distributed optimizer's state setter by one that keeps the step it has."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._set = part._set_main_param_and_optimizer_states

    def __call__(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self._part.model_param_group_index_map[model_param]
        main_param = self._part.optimizer.param_groups[group]["params"][order]
        self._set(model_param, {"step": self._part.optimizer.state[main_param]["step"], **tensors})


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _sharded_rng(layout: ParallelLayout, state: dict[str, Any] | None) -> ShardedObject:
    place = layout.place(dist.get_rank())
    return ShardedObject(
        "rng",
        state,
        (layout.pipeline_size, layout.tensor_size),
        (place.pipeline_rank, place.tensor_rank),
        replica_id=place.data_rank,
    )
