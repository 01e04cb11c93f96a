"""Weights as a stream of buckets: how both ends cut their pieces alike, stage them, and check what arrived.

A bucket is blocks of parameters and a checksum of each. A rank handles all its buckets in one
order that everybody agrees on, with two in flight: while one travels, the next is filled or the last is
written. So two buckets are all the memory that a rank needs, and no rank can wait for another in a circle:
whichever bucket comes first of all that are left, all its ends have it next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_group import WeightGroup

ALONE_BYTES = 64 << 10
"""A block of at least this size is a message of its own."""
_CHECKSUM_BYTES = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

Convert = Callable[["Block", torch.Tensor, torch.Tensor], torch.Tensor]
"""Puts the values of a block into a tensor of the dtype that travels, and returns that."""


@dataclass(frozen=True, slots=True)
class Piece:
    """``param[start : start + shape[dim]]`` along ``dim``, at one end of a transfer."""

    tensor: str
    """The Hugging Face tensor that it is a part of."""
    param: str
    dim: int
    start: int
    shape: tuple[int, ...]
    dtype: str
    """What travels: the dtype of the engine's parameter."""

    @property
    def itemsize(self) -> int:
        return dtype_named(self.dtype).itemsize

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
    """``rows`` rows of a piece, from ``row``."""

    piece: Piece
    row: int
    rows: int
    offset: int = 0
    """Byte of the bucket at which they begin."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.piece.shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.piece.itemsize

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the view of the parameter."""
        return self.piece.of(parameter).narrow(0, self.row, self.rows)

    def staged(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the view of the staging buffer."""
        whole = buffer[self.offset : self.offset + self.num_bytes]
        return whole.view(dtype_named(self.piece.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Blocks that are sent together.

    A large block is a message of its own, which needs no copy at an end where it lies in one piece; the others are
    packed into one message, with the checksums of all.
    """

    link: Link
    number: int
    """Within the link."""
    first_tag: int
    """Of its messages, which count up within the link."""
    alone: tuple[Block, ...]
    packed: tuple[Block, ...]
    packed_at: int
    """Byte at which the packed message begins."""
    checksums_at: int
    """Byte at which, within it, the checksums begin."""
    payload_bytes: int

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.alone + self.packed

    @property
    def num_bytes(self) -> int:
        return self.checksums_at + _CHECKSUM_BYTES * len(self.blocks)


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def schedule(links: Sequence[Link], bucket_bytes: int) -> list[Bucket]:
    """Every bucket of a rank, in the order in which all ranks agree to handle them.

    Raises:
        ValueError: one row of a piece does not fit into a bucket.
    """
    buckets = itertools.chain.from_iterable(_cut(link, bucket_bytes) for link in links)
    return sorted(buckets, key=lambda bucket: (bucket.number, bucket.link.order))


def _cut(link: Link, bucket_bytes: int) -> Iterator[Bucket]:
    """Fill buckets with rows, in the order of the pieces."""
    number = tag = filled = 0
    blocks: list[Block] = []
    for piece in link.pieces:
        row_bytes = math.prod(piece.shape[1:]) * piece.itemsize
        row = 0
        while row < piece.shape[0]:
            room = bucket_bytes - filled - _CHECKSUM_BYTES * (len(blocks) + 2)
            rows = min(piece.shape[0] - row, max(0, room) // row_bytes)
            if rows:
                blocks.append(Block(piece, row, rows))
                row += rows
                filled += _whole_words(rows * row_bytes)
            elif blocks:
                bucket = _close(link, number, tag, blocks)
                yield bucket
                number, tag, filled, blocks = number + 1, tag + len(bucket.alone) + 1, 0, []
            else:
                raise ValueError(
                    f"publish.bucket_bytes: a row of {piece.tensor} ({row_bytes} bytes) does not fit into"
                    f" {bucket_bytes}"
                )
    if blocks:
        yield _close(link, number, tag, blocks)


def _close(link: Link, number: int, tag: int, blocks: Sequence[Block]) -> Bucket:
    """Give every block its place: those that travel alone, then the others, then the checksums."""
    large = [block.num_bytes >= ALONE_BYTES for block in blocks]
    at = 0
    placed: dict[bool, list[Block]] = {True: [], False: []}
    packed_at = 0
    for alone in (True, False):
        packed_at = at
        for block, is_large in zip(blocks, large, strict=True):
            if is_large is alone:
                placed[alone].append(replace(block, offset=at))
                at += _whole_words(block.num_bytes)
    payload_bytes = sum(block.num_bytes for block in blocks)
    return Bucket(link, number, tag, tuple(placed[True]), tuple(placed[False]), packed_at, at, payload_bytes)


def _whole_words(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8  # checksums are taken of 8-byte words


def checksum(block: torch.Tensor) -> torch.Tensor:
    """Sum of the words of a block, as 64-bit integers that wrap around; a scalar on the block's device.

    Words are 8 bytes where the last dimension allows, whatever the strides, so that both ends choose alike.
    The sum sees every changed, missing or doubled value; values that only changed places are the canary's.
    """
    wide = block.shape[-1] * block.itemsize % 8 == 0
    in_place = block.stride(-1) == 1 and all(
        elements * block.itemsize % 8 == 0 for elements in (block.storage_offset(), *block.stride()[:-1])
    )
    if wide and not in_place:  # a few rows at a time: a copy of all would be as large as a buffer
        rows = max(1, ALONE_BYTES // (math.prod(block.shape[1:]) * block.itemsize))
        return torch.stack(
            [checksum(part.clone(memory_format=torch.contiguous_format)) for part in block.split(rows)]
        ).sum()
    return block.view(_WORDS[8 if wide else block.itemsize]).sum(dtype=torch.int64)


def copy(block: Block, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Convert values that are the same number in either dtype, but for its rounding."""
    return target.copy_(values)


def checksums(
    bucket: Bucket, parameter: Callable[[str], torch.Tensor], convert: Convert = copy
) -> torch.Tensor:
    """Checksums of a bucket's blocks, [blocks], as they are in the parameters and converted to what travels."""
    taken = []
    for block in bucket.blocks:
        values, dtype = block.of(parameter(block.piece.param)), dtype_named(block.piece.dtype)
        if values.dtype != dtype:
            values = convert(block, values, torch.empty(block.shape, dtype=dtype, device=values.device))
        taken.append(checksum(values))
    return torch.stack(taken)


class Staging:
    """A rank's two buffers: on the GPU for NCCL, in host memory (pinned, if there is a GPU) for gloo."""

    def __init__(
        self,
        group: WeightGroup,
        buckets: Sequence[Bucket],
        device: torch.device,
        parameter: Callable[[str], torch.Tensor],
        convert: Convert = copy,
    ) -> None:
        """Allocate.

        Args:
            group: how the buckets travel.
            buckets: of this rank.
            device: of its parameters.
            parameter: returns one of them by name.
            convert: makes of a parameter's values what travels, where that has another dtype.
        """
        self._parameter = parameter
        self._convert = convert
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

    def fill(self, index: int, bucket: Bucket, sums: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Gather a bucket, converted to what travels.

        Args:
            index: of the bucket among all of this rank.
            bucket: the bucket.
            sums: its ``checksums``, if they have been taken; otherwise they are now.

        Returns:
            Its messages.
        """
        buffer = self._buffers[index % 2]
        values = []
        for block in bucket.blocks:
            value = block.of(self._parameter(block.piece.param))
            if not self._needs_no_copy(block, bucket, value):
                value = self._convert(block, value, block.staged(buffer))
            values.append(value)
        if self._checksums:
            taken = torch.stack([checksum(value) for value in values]) if sums is None else sums
            _sums(buffer, bucket).copy_(taken)
        return [*values[: len(bucket.alone)], buffer[bucket.packed_at : bucket.num_bytes]]

    def receive(self, index: int, bucket: Bucket) -> list[torch.Tensor]:
        """Where the messages of the ``index``-th bucket are to go."""
        buffer = self._buffers[index % 2]
        messages = []
        for block in bucket.alone:
            target = block.of(self._parameter(block.piece.param))
            staged = not self._needs_no_copy(block, bucket, target)
            messages.append(block.staged(buffer) if staged else target)
        return [*messages, buffer[bucket.packed_at : bucket.num_bytes]]

    def write(self, index: int, bucket: Bucket) -> torch.Tensor | None:
        """Put a bucket that has come into its parameters, where it is not there already.

        Returns:
            For each block, whether the parameter now has another checksum than was sent.
        """
        buffer = self._buffers[index % 2]
        targets = [block.of(self._parameter(block.piece.param)) for block in bucket.blocks]
        for block, target in zip(bucket.blocks, targets, strict=True):
            if not self._needs_no_copy(block, bucket, target):
                target.copy_(block.staged(buffer))
        if not self._checksums:
            return None
        written = torch.stack([checksum(target) for target in targets])
        return written != _sums(buffer, bucket).to(written.device)

    def _needs_no_copy(self, block: Block, bucket: Bucket, value: torch.Tensor) -> bool:
        """Whether this part of a parameter is itself a message of the bucket."""
        return (
            block.offset < bucket.packed_at
            and value.dtype == dtype_named(block.piece.dtype)
            and value.is_contiguous()
            and value.device == self._buffers[0].device
        )


def _sums(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return buffer[bucket.checksums_at : bucket.num_bytes].view(torch.int64)


def _as_known(message: torch.Tensor) -> torch.Tensor:
    """The same bytes in a dtype that every version of NCCL and gloo has; FP8 is none."""
    return message.view(torch.uint8) if message.itemsize == 1 else message


class InFlight:
    """The messages of one bucket on their way to or from a peer."""

    def __init__(
        self,
        move: Callable[[list[torch.Tensor], int, int], dist.Work],
        group: WeightGroup,
        peer: int,
        bucket: Bucket,
        messages: Sequence[torch.Tensor],
    ) -> None:
        """Begin.

        Args:
            move: the channel's ``send`` or ``recv``.
            group: whose channel it is.
            peer: group rank at the other end.
            bucket: what moves.
            messages: of ``Staging``.
        """
        self._group = group
        self._peer = peer
        self._bucket = bucket
        self._works = [
            move([_as_known(message)], peer, bucket.first_tag + position)
            for position, message in enumerate(messages)
        ]

    def wait(self) -> None:
        """Wait until all are there.

        Raises:
            RuntimeError: one failed; names the peer and the slices.
        """
        try:
            for work in self._works:
                if self._group.backend == "gloo":
                    work.wait(timedelta(seconds=self._group.timeout_seconds))
                else:  # the stream waits, not this thread
                    work.wait()
        except RuntimeError as error:
            blocks = self._bucket.blocks
            raise RuntimeError(
                f"weight group {self._group.name}: bucket {self._bucket.number}"
                f" ({blocks[0].piece.tensor} .. {blocks[-1].piece.tensor}) exchanged with rank {self._peer}: {error}"
            ) from error
