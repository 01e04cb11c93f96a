"""Who sends which slice to whom: the intersection of what the trainer's and the engines' ranks hold. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_ztrl.engines.weight_stream import Link, Piece
from megatron_ztrl.types import TensorSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Sends a block of ``source_param`` to a block of ``target_param``; ``dim`` is the one that is cut."""

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
    shape: tuple[int, ...]
    """Of the block."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """How the weights reach all engines.

    The trainer feeds the first engine of each chain; every other engine gets its weights from the one before
    it, bucket by bucket, while that one is still receiving. There are as many chains as copies of the weights
    (data-parallel replicas), so that no trainer rank sends anything twice, however many engines there are.
    """

    chains: list[list[int]]
    """Engines by index."""
    transfers: list[Transfer]
    """Target ``c * ranks_per_engine + r`` is rank ``r`` of the first engine of chain ``c``."""
    num_senders: int
    ranks_per_engine: int

    @property
    def world_size(self) -> int:
        """Members of the weight group: senders, then the ranks of engine 0, 1, and so on."""
        return self.num_senders + self.ranks_per_engine * sum(map(len, self.chains))

    def sender_links(self, dtypes: Mapping[str, str]) -> list[list[Link]]:
        """Per trainer rank, what it sends to whom; ``dtypes`` is what each tensor travels as."""
        links: list[list[Link]] = [[] for _ in range(self.num_senders)]
        for order, ((source, target), items) in enumerate(self._streams()):
            chain, rank = divmod(target, self.ranks_per_engine)
            pieces = tuple(
                Piece(t.tensor, t.source_param, t.dim, t.source_start, t.shape, dtypes[t.tensor])
                for t in items
            )
            links[source].append(Link(order, self.group_rank(self.chains[chain][0], rank), None, pieces))
        return links

    def receiver_links(self, dtypes: Mapping[str, str]) -> list[list[list[Link]]]:
        """Per engine and rank of it, what it receives from whom, and sends on to whom; see ``sender_links``."""
        links: list[list[list[Link]]] = [
            [[] for _ in range(self.ranks_per_engine)] for _ in range(sum(map(len, self.chains)))
        ]
        for order, ((source, target), items) in enumerate(self._streams()):
            chain, rank = divmod(target, self.ranks_per_engine)
            pieces = tuple(
                Piece(t.tensor, t.target_param, t.dim, t.target_start, t.shape, dtypes[t.tensor])
                for t in items
            )
            peers = self._path(source, target)
            for place, engine in enumerate(self.chains[chain]):
                forward_to = peers[place + 2] if place + 2 < len(peers) else None
                links[engine][rank].append(Link(order, peers[place], forward_to, pieces))
        return links

    def group_rank(self, engine: int, rank: int) -> int:
        """Number of an engine's rank in the weight group."""
        return self.num_senders + engine * self.ranks_per_engine + rank

    def link_elements(self) -> dict[tuple[int, int], int]:
        """Elements that each (from, to) pair of group ranks moves in one publish."""
        elements: Counter[tuple[int, int]] = Counter()
        for (source, target), items in self._streams():
            for pair in pairwise(self._path(source, target)):
                elements[pair] += sum(item.elements for item in items)
        return elements

    def _path(self, source: int, target: int) -> list[int]:
        """Group ranks that a stream goes through: its sender, and one rank of every engine of the chain."""
        chain, rank = divmod(target, self.ranks_per_engine)
        return [source, *(self.group_rank(engine, rank) for engine in self.chains[chain])]

    def _streams(self) -> list[tuple[tuple[int, int], list[Transfer]]]:
        """Transfers by pair, in the order that all ranks follow.

        In each round of ``max(S, T)`` no rank is in two pairs, so that all of them are busy at once.
        """
        streams: dict[tuple[int, int], list[Transfer]] = {}
        for item in self.transfers:
            streams.setdefault((item.source, item.target), []).append(item)
        rounds = max(self.num_senders, len(self.chains) * self.ranks_per_engine)
        return sorted(streams.items(), key=lambda stream: ((stream[0][1] - stream[0][0]) % rounds, stream[0]))


def plan(
    senders: Sequence[list[TensorSlice]],
    engine_ranks: Sequence[list[TensorSlice]],
    num_engines: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> PublishPlan:
    """Cover every row that an engine rank holds exactly once.

    A row that several senders hold (data-parallel replicas, norms, tied embeddings on two pipeline stages)
    comes from one that has not sent it yet, and of those the one that has the least to send so far. Rows
    that no engine wants, such as vocabulary padding, stay.

    Args:
        senders: per trainer rank, what it holds.
        engine_ranks: per tensor-parallel rank of an engine, what it needs; all engines are alike.
        num_engines: how many there are.
        shapes: of the Hugging Face tensors.

    Raises:
        ValueError: names the tensor that nobody holds completely, that a receiver lists twice, or that the
            two ends cut along different dimensions.
    """
    holders: dict[str, list[tuple[int, TensorSlice]]] = {}
    for source, slices in enumerate(senders):
        for held in slices:
            holders.setdefault(held.tensor, []).append((source, held))
    chains = _chains(num_engines, _copies(holders, shapes))
    load = [0] * len(senders)
    sent: set[tuple[int, str, int]] = set()
    transfers: list[Transfer] = []
    for chain in range(len(chains)):
        for rank, slices in enumerate(engine_ranks):
            _check_disjoint(slices, rank)
            target = chain * len(engine_ranks) + rank
            for wanted in slices:
                found = holders.get(wanted.tensor, [])
                transfers.extend(_cover(wanted, rank, target, found, shapes[wanted.tensor], load, sent))
    return PublishPlan(
        chains=chains, transfers=transfers, num_senders=len(senders), ranks_per_engine=len(engine_ranks)
    )


def _copies(
    holders: Mapping[str, Sequence[tuple[int, TensorSlice]]], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """How many times the senders hold all the weights."""
    return max(
        1,
        min(
            (
                sum(held.length for _, held in found) // shapes[tensor][found[0][1].dim]
                for tensor, found in holders.items()
                if tensor in shapes
            ),
            default=1,
        ),
    )


def _chains(num_engines: int, copies: int) -> list[list[int]]:
    """Neighbouring engines in as many chains of nearly equal length."""
    count = min(copies, num_engines)
    bounds = [num_engines * index // count for index in range(count + 1)] if count else [0]
    return [list(range(start, end)) for start, end in pairwise(bounds)]


def _cover(
    wanted: TensorSlice,
    rank: int,
    target: int,
    holders: Sequence[tuple[int, TensorSlice]],
    shape: tuple[int, ...],
    load: list[int],
    sent: set[tuple[int, str, int]],
) -> Iterator[Transfer]:
    """Yield transfers for one receiver slice, front to back; adds their elements to ``load``."""
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
                f"{wanted.tensor}: no trainer rank holds row {position} that engine rank {rank} needs"
            )
        source, held = min(candidates, key=lambda c: ((c[0], wanted.tensor, position) in sent, load[c[0]]))
        length = min(end, held.tensor_start + held.length) - position
        item = Transfer(
            source=source,
            target=target,
            tensor=wanted.tensor,
            dim=wanted.dim,
            source_param=held.param,
            source_start=held.start + position - held.tensor_start,
            target_param=wanted.param,
            target_start=wanted.start + position - wanted.tensor_start,
            shape=(*shape[: wanted.dim], length, *shape[wanted.dim + 1 :]),
        )
        load[source] += item.elements
        sent.add((source, wanted.tensor, position))
        yield item
        position += length


def _check_disjoint(slices: Sequence[TensorSlice], rank: int) -> None:
    by_param: dict[str, list[TensorSlice]] = {}
    for item in slices:
        by_param.setdefault(item.param, []).append(item)
    for param, items in by_param.items():
        items.sort(key=lambda item: item.start)
        for before, after in pairwise(items):
            if before.start + before.length > after.start:
                raise ValueError(
                    f"{after.tensor}: engine rank {rank} fills row {after.start} of {param} twice"
                )
