"""Resumable state with Megatron's distributed checkpoint, in the format that any later layout can read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ztrl.trainer import optimizer_shards
from megatron_ztrl.trainer.model import PolicyModel
from megatron_ztrl.trainer.shard_writer import BackgroundSave, PendingSave
from megatron_ztrl.trainer.topology import check_same_model
from megatron_ztrl.weights.hf_checkpoint import copy_description, head_config
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout

SHARD_INDEX = ".metadata"
"""Which shard is where in which file; the last file that is written."""


def save(
    directory: Path,
    chunks: list[PolicyModel],
    optimizer: MegatronOptimizer,
    layout: ParallelLayout,
    architecture: Architecture,
    source: Path,
) -> PendingSave:
    """Begins to save parameters, optimizer state and random state; collective over all ranks.

    Returns when everything has been copied, so that training may go on while the copies are written.

    Args:
        directory: Of the checkpoint; made if missing.
        architecture: Of the model.
        source: HF checkpoint that the model began as. Its config.json and tokenizer are copied: the checkpoint says
            by itself what it is of, and can be converted without anything else.
    """
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    _give_every_parameter_adam_state(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["layout"] = _layout_record(layout)
    state["rng"] = _sharded_rng(layout, _rng_state())
    strategy = BackgroundSave("torch_dist", 1)
    # BackgroundSave checks the shards itself, without showing all of them to all ranks.
    dist_checkpointing.save(state, str(directory), sharded_strategy=strategy, validate_access_integrity=False)
    if dist.get_rank() == 0:
        copy_description(source, directory, **head_config(architecture))
    return strategy.pending


def load(
    directory: Path,
    chunks: list[PolicyModel],
    optimizer: MegatronOptimizer,
    layout: ParallelLayout,
    architecture: Architecture,
) -> None:
    """Restores what :func:`save` wrote, under the same or another layout; collective over all ranks.

    The random state is restored only under the same layout. No dropout draws from it.

    Raises:
        ValueError: there is no complete checkpoint in ``directory``, or it is of another model.
    """
    if not (directory / SHARD_INDEX).is_file():
        raise ValueError(f"{directory} holds no complete Megatron checkpoint ({SHARD_INDEX} is missing)")
    check_same_model(directory, architecture)
    _give_every_parameter_adam_state(optimizer)
    for part in _parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer) and not part.optimizer.state:
            part.optimizer.dummy_step()  # makes the state; what it does to the weights is overwritten
    state = _sharded_state(chunks, optimizer, is_loading=True)
    _leave_out_new_extra_state(directory, [state[_chunk_key(index, chunks)] for index in range(len(chunks))])
    stored_layout = dist_checkpointing.load_common_state_dict(str(directory))["layout"]
    same_layout = {"context": 1} | stored_layout == _layout_record(layout)
    if same_layout:
        state["rng"] = _sharded_rng(layout, None)
    loaded = dist_checkpointing.load(state, str(directory))
    for index, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[_chunk_key(index, chunks)], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise ValueError(f"{directory}: missing {missing}, unexpected {result.unexpected_keys}")
    _load_optimizer(optimizer, loaded)
    if same_layout:
        _restore_rng(loaded["rng"])


def _leave_out_new_extra_state(directory: Path, model_states: list[dict[str, Any]]) -> None:
    """Transformer Engine's modules have more of it (FP8 scales) than the local layers that may have been saved."""
    stored = load_sharded_metadata(str(directory))
    for model_state in model_states:
        for name, entry in list(model_state.items()):
            is_extra = isinstance(entry, ShardedObject) and name.endswith("_extra_state")
            if is_extra and entry.unique_key not in stored:
                del model_state[name]


def _sharded_state(
    chunks: list[PolicyModel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        _chunk_key(index, chunks): chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    if not _is_distributed(optimizer):
        model_state = state if len(chunks) > 1 else state["model"]
        optimizer_state = optimizer.sharded_state_dict(
            dict(model_state), is_loading=is_loading, metadata=metadata
        )
        return {**state, "optimizer": optimizer_state}
    model_state = dict(state)
    if not is_loading:
        state["optimizer"] = optimizer.state_dict()  # parameter groups only: alike on all ranks
    state["optimizer_shards"] = [
        optimizer_shards.shards(part, model_state, is_loading=is_loading) for part in _parts(optimizer)
    ]
    return state


def _chunk_key(index: int, chunks: list[PolicyModel]) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def _layout_record(layout: ParallelLayout) -> dict[str, int]:
    return {
        "tensor": layout.tensor_size,
        "pipeline": layout.pipeline_size,
        "data": layout.data_size,
        "context": layout.context_size,
    }


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    return all(isinstance(part, DistributedOptimizer) for part in _parts(optimizer))


def _give_every_parameter_adam_state(optimizer: MegatronOptimizer) -> None:
    """Adam makes its state in the first step, but there may be a save or a load before it."""
    for part in _parts(optimizer):
        if part.init_state_fn is not None:  # None with states in host memory
            if part.config.use_precision_aware_optimizer:
                _initialise_precise_states(part.optimizer)
            else:
                part.init_state_fn(part.optimizer, part.config)
        if _uses_torch_adam(part):  # which wants to find its step, too
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _initialise_precise_states(adam: Any) -> None:
    """Megatron 0.16 leaves the second argument out, which Transformer Engine's Adam wants."""
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            adam.initialize_state(parameter, adam.store_param_remainders)


def _uses_torch_adam(part: Any) -> bool:
    """Without Transformer Engine and apex, Megatron takes torch's Adam, which keeps ``step`` tensors."""
    return isinstance(part.optimizer, torch.optim.Optimizer) and type(part.optimizer).__module__.startswith(
        "torch."
    )


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    # Settings are those of this run and of this kind of Adam, not those of the run that saved them.
    progress = ("params", "step")
    settings = [
        {name: value for name, value in group.items() if name not in progress}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(loaded["optimizer"])
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
    for part in filter(_uses_torch_adam, _parts(optimizer)):
        # Megatron 0.16 gives all parameters one step tensor, which each of them would advance in every step.
        for parameter_state in part.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()
    for part, shards in zip(_parts(optimizer), loaded.get("optimizer_shards", []), strict=False):
        optimizer_shards.load_shards(part, shards)


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
        replica_id=place.data_rank * layout.context_size + place.context_rank,
    )
