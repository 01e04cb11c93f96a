"""Weights as a stream of buckets: how both ends cut their pieces alike, stage them, and check what arrived.

A bucket is one message: blocks of parameters, then one checksum for each. A rank handles all its buckets in one
order that everybody agrees on, with two in flight: while one travels, the next is filled or the last is
written. So two buckets are all the memory that a rank needs, and no rank can wait for another in a circle:
whichever bucket comes first of all that are left, all its ends have it next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_group import WeightGroup

_CHECKSUM_BYTES = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True, slots=True)
class Piece:
    """``param[start : start + shape[dim]]`` along ``dim``, at one end of a transfer."""

    tensor: str
    """The Hugging Face tensor that it is a part of."""
    param: str
    dim: int
    start: int
    shape: tuple[int, ...]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of the parameter.

        Raises:
            ValueError: the parameter has another shape than planned.
        """
        whole = list(parameter.shape)
        end = self.start + self.shape[self.dim]
        if whole[: self.dim] + whole[self.dim + 1 :] != list(
            self.shape[: self.dim] + self.shape[self.dim + 1 :]
        ) or end > (whole[self.dim] if self.dim < len(whole) else 0):
            raise ValueError(
                f"{self.tensor}: {self.param} has shape {whole}, which does not hold"
                f" [{self.start}:{end}] along dimension {self.dim} of a block of {list(self.shape)}"
            )
        return parameter.narrow(self.dim, self.start, self.shape[self.dim])


@dataclass(frozen=True, slots=True)
class Link:
    """All that one rank receives from another, or sends to it."""

    order: int
    """Place among all streams, the same at every end."""
    peer: int
    """Group rank at the other end."""
    forward_to: int | None
    """Group rank that this receiver sends the same buckets on to."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """``rows`` rows of a piece, from ``row``, at byte ``offset`` of the bucket."""

    piece: Piece
    row: int
    rows: int
    offset: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of the parameter."""
        return self.piece.of(parameter).narrow(0, self.row, self.rows)

    def staged(self, buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the view of the staging buffer."""
        shape = (self.rows, *self.piece.shape[1:])
        num_bytes = math.prod(shape) * dtype.itemsize
        return buffer[self.offset : self.offset + num_bytes].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One message."""

    link: Link
    number: int
    """Within the link; also the message's tag."""
    blocks: tuple[Block, ...]
    checksums_at: int
    """Byte at which the checksums begin."""
    payload_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.checksums_at + _CHECKSUM_BYTES * len(self.blocks)


def schedule(links: Sequence[Link], dtype: torch.dtype, bucket_bytes: int) -> list[Bucket]:
    """Every bucket of a rank, in the order in which all ranks agree to handle them.

    Raises:
        ValueError: one row of a piece does not fit into a bucket.
    """
    buckets = itertools.chain.from_iterable(_cut(link, dtype.itemsize, bucket_bytes) for link in links)
    return sorted(buckets, key=lambda bucket: (bucket.number, bucket.link.order))


def _cut(link: Link, itemsize: int, bucket_bytes: int) -> Iterator[Bucket]:
    """Fill buckets with rows, in the order of the pieces."""
    number = filled = payload = 0
    blocks: list[Block] = []
    for piece in link.pieces:
        row_bytes = math.prod(piece.shape[1:]) * itemsize
        row = 0
        while row < piece.shape[0]:
            room = bucket_bytes - filled - _CHECKSUM_BYTES * (len(blocks) + 2)
            rows = min(piece.shape[0] - row, max(0, room) // row_bytes)
            if rows:
                blocks.append(Block(piece, row, rows, filled))
                row += rows
                payload += rows * row_bytes
                filled += -(-rows * row_bytes // 8) * 8  # checksums are taken of 8-byte words
            elif blocks:
                yield Bucket(link, number, tuple(blocks), filled, payload)
                number, filled, payload, blocks = number + 1, 0, 0, []
            else:
                raise ValueError(
                    f"publish.bucket_bytes: a row of {piece.tensor} ({row_bytes} bytes) does not fit into"
                    f" {bucket_bytes}"
                )
    if blocks:
        yield Bucket(link, number, tuple(blocks), filled, payload)


def checksum(block: torch.Tensor) -> torch.Tensor:
    """Sum of the words of a block, as 64-bit integers that wrap around; a scalar on the block's device.

    Words are 8 bytes where the last dimension allows, whatever the strides, so that both ends choose alike.
    The sum sees every changed, missing or doubled value; values that only changed places are the canary's.
    """
    wide = block.shape[-1] * block.itemsize % 8 == 0
    in_place = block.stride(-1) == 1 and all(
        elements * block.itemsize % 8 == 0 for elements in (block.storage_offset(), *block.stride()[:-1])
    )
    if wide and not in_place:
        block = block.clone(memory_format=torch.contiguous_format)
    return block.view(_WORDS[8 if wide else block.itemsize]).sum(dtype=torch.int64)


class Staging:
    """A rank's two buffers: on the GPU for NCCL, in host memory (pinned, if there is a GPU) for gloo."""

    def __init__(self, group: WeightGroup, buckets: Sequence[Bucket], device: torch.device) -> None:
        self.dtype: torch.dtype = getattr(torch, group.dtype)
        self._checksums = group.checksums
        size = max((bucket.num_bytes for bucket in buckets), default=0)
        on_host = group.backend == "gloo"
        self._buffers = [
            torch.empty(
                size,
                dtype=torch.uint8,
                device="cpu" if on_host else device,
                pin_memory=on_host and device.type == "cuda",
            )
            for _ in range(2)
        ]

    def buffer(self, index: int, bucket: Bucket) -> torch.Tensor:
        """The message of the ``index``-th bucket."""
        return self._buffers[index % 2][: bucket.num_bytes]

    def fill(self, buffer: torch.Tensor, bucket: Bucket, parameter: Callable[[str], torch.Tensor]) -> None:
        """Gather the blocks of a bucket, converted to what travels, and their checksums."""
        staged = [block.staged(buffer, self.dtype) for block in bucket.blocks]
        for block, copy in zip(bucket.blocks, staged, strict=True):
            copy.copy_(block.of(parameter(block.piece.param)))
        if self._checksums:
            _sums(buffer, bucket).copy_(torch.stack([checksum(copy) for copy in staged]))

    def write(
        self, buffer: torch.Tensor, bucket: Bucket, parameter: Callable[[str], torch.Tensor]
    ) -> torch.Tensor | None:
        """Put a bucket into its parameters.

        Returns:
            For each block, whether the parameter now has another checksum than was sent.
        """
        targets = [block.of(parameter(block.piece.param)) for block in bucket.blocks]
        for block, target in zip(bucket.blocks, targets, strict=True):
            target.copy_(block.staged(buffer, self.dtype))
        if not self._checksums:
            return None
        written = torch.stack([checksum(target) for target in targets])
        return written != _sums(buffer, bucket).to(written.device)


def _sums(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return buffer[bucket.checksums_at :].view(torch.int64)


def wait(work: dist.Work, group: WeightGroup, peer: int, bucket: Bucket) -> None:
    """Wait for one transfer.

    Raises:
        RuntimeError: it failed; names the peer and the slices.
    """
    try:
        if group.backend == "gloo":
            work.wait(timedelta(seconds=group.timeout_seconds))
        else:  # the stream waits, not this thread
            work.wait()
    except RuntimeError as error:
        first, last = bucket.blocks[0].piece.tensor, bucket.blocks[-1].piece.tensor
        raise RuntimeError(
            f"weight group {group.name}: bucket {bucket.number} ({first} .. {last}) exchanged with rank {peer}:"
            f" {error}"
        ) from error
