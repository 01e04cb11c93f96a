"""The process group that carries weights from trainer ranks to engine ranks, and its buckets.

Both ends import this module, the receiving one inside the SGLang server, so it needs torch only. The group
is made of torch's process-group objects directly on a store: neither end's default group is touched, and no
private function of torch is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist

BUCKET_BYTES = 128 << 20
"""Staging memory for one peer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Where the ranks meet: senders are ``0 .. S - 1``, then come the ranks of engine 0, 1, and so on."""

    name: str
    """Unique for each membership: a group is joined once, and a new one made when an engine is replaced."""
    address: str
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    dtype: Literal["float32", "bfloat16"]
    """What travels: the engine's dtype."""
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Piece:
    """``param[start : start + length]`` along ``dim``, at one end of a transfer."""

    peer: int
    """Group rank at the other end."""
    param: str
    dim: int
    start: int
    length: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of the parameter."""
        return parameter.narrow(self.dim, self.start, self.length)


class Channel(Protocol):
    """The part of torch's process groups that is used here; each call returns at once."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int, /) -> dist.Work: ...


def join(group: WeightGroup, rank: int) -> Channel:
    """Enter the group; returns when all ranks have.

    Raises:
        RuntimeError: not everybody came within the time-out; names the group and the rank.
    """
    timeout = timedelta(seconds=group.timeout_seconds)
    try:
        store = dist.TCPStore(group.address, group.port, is_master=False, timeout=timeout)
        prefixed = dist.PrefixStore(group.name, store)
        if group.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return cast(Channel, dist.ProcessGroupNCCL(prefixed, rank, group.world_size, options))
        return cast(Channel, dist.ProcessGroupGloo(prefixed, rank, group.world_size, timeout))
    except RuntimeError as error:
        raise RuntimeError(
            f"weight group {group.name}: rank {rank} of {group.world_size} could not join at"
            f" {group.address}:{group.port} within {group.timeout_seconds:.0f} s: {error}"
        ) from error


def peer_order(rank: int, peers: Sequence[int]) -> list[int]:
    """Order a rank's peers so that all ranks agree on the order of all pairs.

    Pairs are served by the distance between their ranks. Both ends of every pair then meet in the same
    round: NCCL, which opens each pair's communicator with a blocking call, cannot lock up, and no round
    visits one rank twice.
    """
    return sorted(peers, key=lambda peer: abs(peer - rank))


def buckets(
    pieces: Sequence[Piece], parameter: Callable[[str], torch.Tensor], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[list[torch.Tensor]]:
    """Cut one peer's pieces, in order, into lists of views of at most ``bucket_bytes`` each.

    Both ends see the same sizes in the same order, so they cut alike. A piece longer than a bucket is split
    along its first dimension; a single row may exceed the bucket.
    """
    limit = bucket_bytes // dtype.itemsize
    bucket: list[torch.Tensor] = []
    filled = 0
    for piece in pieces:
        view = piece.of(parameter(piece.param))
        rows = max(1, limit // max(1, view[0].numel()))
        for part in view.split(rows):
            if bucket and filled + part.numel() > limit:
                yield bucket
                bucket, filled = [], 0
            bucket.append(part)
            filled += part.numel()
    if bucket:
        yield bucket
