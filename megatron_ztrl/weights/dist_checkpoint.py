"""The weights in Megatron's distributed checkpoints, read and written block by block, without Megatron.

A ``torch_dist`` checkpoint is a ``torch.distributed.checkpoint`` directory of global tensors, which any parallel
layout can load. Megatron 0.16 gives all layers one tensor with the layer as its first dimension, uses Transformer
Engine's names under either backend, and cuts a global tensor into chunks as the saving ranks held it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.global_tensors import (
    Box,
    Chunk,
    extra_state_keys,
    global_pieces,
    intersection,
    rank_chunks,
)
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout

METADATA_NAME = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What ``METADATA_NAME`` says of a checkpoint that Megatron 0.16 can load."""
COMMON = {"checkpoint_version": 3.0}
"""What every rank loads alike. Megatron-LM takes a checkpoint without a version for one of 2019, and would
reorder the rows of the fused QKV weights."""

Advance = Callable[[int], None]
"""Told how many bytes were done."""


def write_dist_checkpoint(
    directory: Path,
    source: HFCheckpointReader,
    architecture: Architecture,
    layout: ParallelLayout,
    dtype: torch.dtype,
    advance: Advance,
) -> None:
    """Writes an HF checkpoint's weights as the ranks of ``layout`` would save them, one chunk at a time.

    This process writes the files of all ranks. Memory: about the largest chunk of one rank, a few times.

    Args:
        directory: exists.
        source: has every tensor in the right shape.
        dtype: of all weights in the checkpoint.
    """
    chunks: dict[MetadataIndex, Chunk] = {}
    plans = []
    for rank in range(layout.world_size):
        items = []
        for chunk in rank_chunks(architecture, layout, rank):
            item = _write_item(chunk, dtype)
            chunks[item.index] = chunk
            items.append(item)
        items += [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO)
            for key in extra_state_keys(architecture, layout, rank)
        ]
        plans.append(SavePlan(items))
    planner = _StreamingPlanner(source, chunks, dtype, advance)
    # Replicas, such as norms under tensor parallelism, are written by the first rank that has them.
    plans, metadata = planner.create_global_plan(plans)
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(True)
    try:
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    except RuntimeError as error:
        raise reason_of(error) from None
    writer.finish(metadata, results)
    torch.save(COMMON, directory / "common.pt")
    (directory / METADATA_NAME).write_text(json.dumps(FORMAT))


def reason_of(error: BaseException) -> BaseException:
    """The Ctrl-C or full disk behind an error of ``torch.save``, or the error itself if there is neither.

    It completes its archive even then, and fails at that in turn.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt | OSError):
        cause = cause.__context__
    return cause or error


class _StreamingPlanner(DefaultSavePlanner):
    """Reads a chunk from the HF checkpoint when it is about to be written."""

    def __init__(
        self,
        source: HFCheckpointReader,
        chunks: dict[MetadataIndex, Chunk],
        dtype: torch.dtype,
        advance: Advance,
    ) -> None:
        super().__init__(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
        self._source = source
        self._chunks = chunks
        self._dtype = dtype
        self._advance = advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """What to write for an item."""
        if write_item.type is WriteItemType.BYTE_IO:
            return _empty_extra_state()
        chunk = self._chunks[write_item.index]
        tensor = torch.empty(chunk.sizes, dtype=self._dtype)
        if chunk.has_padding:
            tensor.zero_()
        weight = tensor[0] if chunk.is_stacked else tensor
        for start, piece in chunk.pieces:
            part = weight.narrow(piece.dim, start, piece.length)
            self._source.read_into(piece, part)
            self._advance(part.nbytes)
        return tensor


def _write_item(chunk: Chunk, dtype: torch.dtype) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(chunk.global_shape),
        ),
    )


def _empty_extra_state() -> io.BytesIO:
    """What Megatron saves for a layer that has no FP8 scales."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer


@dataclass(frozen=True)
class _StoredChunk:
    index: MetadataIndex
    box: Box


class DistCheckpoint:
    """The global weight tensors of a distributed checkpoint, and blocks of them.

    Optimizer state and random state are passed over.

    Raises:
        ValueError: this is no whole ``torch_dist`` checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._check_format()
        self._storage = FileSystemReader(directory)
        try:
            metadata = self._storage.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise ValueError(f"{directory}/.metadata is damaged: {error}") from error
        self._storage.set_up_storage_reader(metadata, True)
        weights = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self.shapes = {key: tuple(value.size) for key, value in weights.items()}
        """Of the global tensors, with the layer as first dimension where there is one."""
        self.dtypes = {key: value.properties.dtype for key, value in weights.items()}
        self._chunks = {key: list(_stored_chunks(key, value)) for key, value in weights.items()}
        self._check_files()
        self._cache: dict[MetadataIndex, torch.Tensor] = {}

    def parts(self, key: str, dim: int) -> int:
        """How many parts a tensor was cut into along a dimension."""
        return len({chunk.box[dim] for chunk in self._chunks[key]})

    def read(self, boxes: list[tuple[str, Box, torch.Tensor]]) -> None:
        """Fills each tensor with a block: (key, block of the global tensor, where it goes).

        Keeps the chunks that it needed for the next call, and no other.
        """
        needed = [
            (chunk, common, box, target)
            for key, box, target in boxes
            for chunk in self._chunks[key]
            if (common := intersection(chunk.box, box))
        ]
        indices = {chunk.index: chunk for chunk, *_ in needed}
        self._cache = {index: self._cache[index] for index in indices if index in self._cache}
        for index, chunk in indices.items():
            if index not in self._cache:
                self._cache[index] = self._load(chunk)
        for chunk, common, box, target in needed:
            block = self._cache[chunk.index][_within(common, chunk.box)]
            target[_within(common, box)].copy_(block)

    def _load(self, chunk: _StoredChunk) -> torch.Tensor:
        where = self._storage.storage_data[chunk.index]
        sizes = [stop - start for start, stop in chunk.box]
        try:
            with (self._directory / where.relative_path).open("rb", buffering=0) as file:
                section = cast(IO[bytes], _Section(file, where.offset, where.length))
                tensor = torch.load(section, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self._directory}: {chunk.index.fqn} is damaged: {reason}") from error
        if list(tensor.shape) != sizes or tensor.dtype is not self.dtypes[chunk.index.fqn]:
            raise ValueError(f"{self._directory}: {chunk.index.fqn} is not what .metadata says of it")
        return tensor

    def _check_format(self) -> None:
        directory = self._directory
        if not (directory / METADATA_NAME).is_file() or not (directory / ".metadata").is_file():
            inside = [name for name in ("actor", "critic") if (directory / name / METADATA_NAME).is_file()]
            hint = f"; give {' or '.join(str(directory / name) for name in inside)}" if inside else ""
            raise ValueError(f"{directory} is not a complete Megatron distributed checkpoint{hint}")
        try:
            backend = json.loads((directory / METADATA_NAME).read_text())["sharded_backend"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / METADATA_NAME} is damaged: {error!r}") from error
        if backend != FORMAT["sharded_backend"]:
            raise ValueError(
                f"{directory} has the format {backend}; only {FORMAT['sharded_backend']} is read"
            )

    def _check_files(self) -> None:
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            where = self._storage.storage_data[chunk.index]
            path = self._directory / where.relative_path
            size = path.stat().st_size if path.is_file() else 0
            if size < where.offset + where.length:
                raise ValueError(
                    f"{path} is damaged: {size:,} bytes, but {chunk.index.fqn} ends at byte"
                    f" {where.offset + where.length:,}"
                )


class DistCheckpointReader:
    """Reads a distributed checkpoint as if it were the HF checkpoint.

    Raises:
        ValueError: the checkpoint lacks a tensor of this architecture, or has it in another shape.
    """

    def __init__(self, checkpoint: DistCheckpoint, architecture: Architecture) -> None:
        self._checkpoint = checkpoint
        self._pieces = global_pieces(architecture)
        self.keys = {piece.key for pieces in self._pieces.values() for piece in pieces}
        """Of the global tensors that it reads."""
        for pieces in self._pieces.values():
            for piece in pieces:
                shape = checkpoint.shapes.get(piece.key)
                if shape is None or len(shape) != len(piece.box):
                    raise ValueError(
                        f"the checkpoint has no tensor {piece.key} of {len(piece.box)} dimensions"
                    )
                if any(stop > size for (_, stop), size in zip(piece.box, shape, strict=True)):
                    raise ValueError(f"{piece.key} has shape {shape}, too small for config.json")

    def read(self, piece: TensorSlice) -> torch.Tensor:
        """The block of the HF tensor that ``piece`` names, on the CPU, in the checkpoint's dtype."""
        parts = self._pieces[piece.tensor]
        wanted: Box = tuple((0, size) for size in parts[0].hf_shape)
        along = (piece.tensor_start, piece.tensor_start + piece.length)
        wanted = (*wanted[: piece.dim], along, *wanted[piece.dim + 1 :])
        assert along[1] <= parts[0].hf_shape[piece.dim], piece
        sizes = [stop - start for start, stop in wanted]
        block = torch.empty(sizes, dtype=self._checkpoint.dtypes[parts[0].key])
        boxes = []
        for part in parts:
            common = intersection(part.hf_box, wanted)
            if common is None:
                continue
            target = block[_within(common, wanted)]
            box = part.to_global(common)
            boxes.append((part.key, box, target[None] if len(box) > target.dim() else target))
        self._checkpoint.read(boxes)
        return block


class _Section(io.RawIOBase):
    """A part of a file as a file of its own: each tensor was written by a ``torch.save`` behind the others."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length
        file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer)
        return self._file.readinto(view[: max(0, self._length - self.tell())])


def _stored_chunks(key: str, metadata: TensorStorageMetadata) -> Iterator[_StoredChunk]:
    for chunk in metadata.chunks:
        box = tuple((start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        yield _StoredChunk(MetadataIndex(key, chunk.offsets), box)


def _within(box: Box, frame: Box) -> Any:
    """The index of ``box`` in a tensor that holds ``frame``."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, frame, strict=True))
