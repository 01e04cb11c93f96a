"""Who sends which slice to whom: the intersection of what the trainer's and the engine's ranks hold. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_ztrl.types import TensorSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Sends ``length`` rows of ``source_param`` to rows of ``target_param``, along ``dim``."""

    source: int
    """Index among the senders."""
    target: int
    """Index among the receivers."""
    tensor: str
    """The Hugging Face tensor that both ends hold a part of."""
    dim: int
    source_param: str
    source_start: int
    target_param: str
    target_start: int
    length: int


def plan(senders: Sequence[list[TensorSlice]], receivers: Sequence[list[TensorSlice]]) -> list[Transfer]:
    """Cover every row that a receiver holds exactly once.

    A row that several senders hold (data-parallel replicas, norms, tied embeddings on two pipeline stages)
    comes from the one that has the least to send so far. Rows that no receiver wants, such as vocabulary
    padding, stay.

    Args:
        senders: per trainer rank, what it holds.
        receivers: per engine rank, what it needs.

    Returns:
        Transfers grouped by receiver, in the order of its slices.

    Raises:
        ValueError: names the tensor that nobody holds completely, that a receiver lists twice, or that the
            two ends cut along different dimensions.
    """
    holders: dict[str, list[tuple[int, TensorSlice]]] = {}
    for source, slices in enumerate(senders):
        for held in slices:
            holders.setdefault(held.tensor, []).append((source, held))
    load = [0] * len(senders)
    transfers: list[Transfer] = []
    for target, slices in enumerate(receivers):
        _check_disjoint(slices, target)
        for wanted in slices:
            transfers.extend(_cover(wanted, target, holders.get(wanted.tensor, []), load))
    return transfers


def _cover(
    wanted: TensorSlice, target: int, holders: Sequence[tuple[int, TensorSlice]], load: list[int]
) -> Iterator[Transfer]:
    """Yield transfers for one receiver slice, front to back; adds their lengths to ``load``."""
    for _, held in holders:
        if held.dim != wanted.dim:
            raise ValueError(
                f"{wanted.tensor}: the trainer cuts it along dimension {held.dim},"
                f" the engine along {wanted.dim}"
            )
    position, end = wanted.tensor_start, wanted.tensor_start + wanted.length
    while position < end:
        candidates = [(s, h) for s, h in holders if h.tensor_start <= position < h.tensor_start + h.length]
        if not candidates:
            raise ValueError(
                f"{wanted.tensor}: no trainer rank holds row {position} that engine rank {target} needs"
            )
        source, held = min(candidates, key=lambda candidate: load[candidate[0]])
        length = min(end, held.tensor_start + held.length) - position
        load[source] += length
        yield Transfer(
            source=source,
            target=target,
            tensor=wanted.tensor,
            dim=wanted.dim,
            source_param=held.param,
            source_start=held.start + position - held.tensor_start,
            target_param=wanted.param,
            target_start=wanted.start + position - wanted.tensor_start,
            length=length,
        )
        position += length


def _check_disjoint(slices: Sequence[TensorSlice], target: int) -> None:
    by_param: dict[str, list[TensorSlice]] = {}
    for item in slices:
        by_param.setdefault(item.param, []).append(item)
    for param, items in by_param.items():
        items.sort(key=lambda item: item.start)
        for before, after in pairwise(items):
            if before.start + before.length > after.start:
                raise ValueError(
                    f"{after.tensor}: engine rank {target} fills row {after.start} of {param} twice"
                )
