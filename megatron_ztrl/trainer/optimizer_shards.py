"""The distributed optimizer's state in a checkpoint: every rank writes the elements that it updates, and no others.

Megatron 0.16 has a format that any layout can load, ``fully_reshardable``, which first gathers the state of all
data-parallel ranks on each of them (or on one), and one without a gather, ``dp_reshardable``, which only another
data-parallel size can load. Its third, of flattened shards, is one that its own ``ShardedTensor`` refuses.

Here the run of elements that a rank has of a parameter is cut into rectangles: shards of the very tensors that
``fully_reshardable`` saves, so that either way of saving can be loaded in any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Rectangle = tuple[tuple[int, int], ...]
"""[start, stop) in every dimension."""
Shards = list[dict[str, list[ShardedTensor]]]
"""For each parameter that a rank has a run of, and each of its states, the rectangles of that run, in order."""

STEP = "step"
"""State of torch's Adam that is alike everywhere, and saved with the parameter groups."""


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cuts a run of a flattened tensor into few rectangles of the tensor, in order.

    Args:
        shape: Of the tensor.
        start: First element of the run.
        stop: Behind its last; greater than ``start``.
    """
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row_size = math.prod(shape[1:])
    (first, before), (last, rest) = divmod(start, row_size), divmod(stop, row_size)
    if first == last:
        yield from (((first, first + 1), *inner) for inner in rectangles(shape[1:], before, rest))
        return
    if before:
        yield from (((first, first + 1), *inner) for inner in rectangles(shape[1:], before, row_size))
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if rest:
        yield from (((last, last + 1), *inner) for inner in rectangles(shape[1:], 0, rest))


def shards(optimizer: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> Shards:
    """What this rank saves or loads of the optimizer's state.

    Args:
        optimizer: Has state for all of its parameters.
        model_state: The model's sharded state, which says where parameters lie in global tensors.
        is_loading: Leaves memory for the loaded elements to the loader.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {entry.data: entry for entry in nested_values(tensors)}
    found: Shards = []
    for parameter, start, stop in _runs(optimizer):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        wholes = _regular_shards(by_parameter[parameter])
        found.append(
            {
                name: list(_cut(optimizer, wholes, name, state, start, stop, is_loading=is_loading))
                for name, state in states.items()
                if name != STEP
            }
        )
    return found


@torch.no_grad()
def load_shards(optimizer: DistributedOptimizer, loaded: list[dict[str, list[Tensor]]]) -> None:
    """Takes over the elements that were loaded for :func:`shards`."""
    for (parameter, _, _), states in zip(_runs(optimizer), loaded, strict=True):
        current = optimizer._get_main_param_and_optimizer_states(parameter)
        runs = {name: torch.cat([block.flatten() for block in blocks]) for name, blocks in states.items()}
        optimizer._set_main_param_and_optimizer_states(parameter, current | runs)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _runs(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """(parameter, first element, behind the last) of what this rank updates."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _regular_shards(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The shards that a parameter is saved as, in the order of its elements.

    The halves of a gated MLP's first layer lie apart in the global tensor, and are two.
    """
    if isinstance(entry, ShardedTensor):
        return [entry]
    return entry.build_fn(
        entry.key, torch.empty(entry.data.shape, device="meta"), entry.replica_id, entry.flattened_range
    )


def _cut(
    optimizer: DistributedOptimizer,
    wholes: list[ShardedTensor],
    name: str,
    state: Tensor,
    start: int,
    stop: int,
    *,
    is_loading: bool,
) -> Iterator[ShardedTensor]:
    """``state`` holds elements [start, stop) of the parameter that the shards are of."""
    behind = done = 0
    for whole in wholes:
        begin, behind = behind, behind + math.prod(whole.local_shape)
        low, high = max(start, begin) - begin, min(stop, behind) - begin
        if low >= high:
            continue
        prepended = whole.global_offset[: whole.prepend_axis_num]
        within = whole.global_offset[whole.prepend_axis_num :]
        for rectangle in rectangles(whole.local_shape, low, high):
            # A shard that is off the regular grid has the layer's dimension as every other.
            sizes = (1,) * len(prepended) + tuple(b - a for a, b in rectangle)
            count = math.prod(sizes)
            yield replace(
                whole,
                key=f"optimizer.state.{name}.{whole.key}",
                data=None if is_loading else state.detach()[done : done + count].view(sizes),
                dtype=state.dtype,
                local_shape=sizes,
                global_offset=(*prepended, *(at + a for at, (a, _) in zip(within, rectangle, strict=True))),
                prepend_axis_num=0,
                axis_fragmentations=None,
                # Data-parallel ranks hold no replicas of each other's runs.
                replica_id=(*whole.replica_id[:2], optimizer.distributed_optimizer_instance_id),
            )
            done += count
    assert done == stop - start == state.numel(), (name, done, start, stop, state.shape)
