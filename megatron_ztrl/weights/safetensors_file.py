"""Safetensors files, read and written block by block with plain file calls.

The library's own ``safe_open`` maps a file into memory, where every page that was read once counts as memory of
the process, and its ``save_file`` wants all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights come in, by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
_LENGTH_BYTES = 8
"""The file starts with the length of its header."""
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100 << 20
_ROWS_BYTES = 4 << 20
"""Read at a time where columns are wanted."""


class SafetensorsFile:
    """Random access to the rows and columns of one file's tensors. Holds no file descriptor between calls.

    Raises:
        ValueError: the file is missing, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            header, self._data_start, size = _read_header(path)
            self._tensors = {
                name: (str(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self.shapes = {name: shape for name, (_, shape, _, _) in self._tensors.items()}
        """Of every tensor, in the order of the header."""
        end = self._data_start + max((entry[3] for entry in self._tensors.values()), default=0)
        if size != end:
            raise ValueError(f"{path} is damaged: {size:,} bytes, where its header promises {end:,}")
        for name, (dtype, shape, first, last) in self._tensors.items():
            if dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize:
                raise ValueError(f"{path} is damaged: {name} has {last - first:,} bytes, but shape {shape}")

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor.

        Raises:
            ValueError: it is none of ``DTYPES``.
        """
        dtype = self._tensors[name][0]
        if dtype not in DTYPES:
            raise ValueError(f"{self._path}: {name} is {dtype}; weights must be one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Rows (``dim`` 0) or columns (``dim`` 1 of a matrix) ``[start, start + length)`` of a tensor."""
        shape = self.shapes[name]
        block = torch.empty((*shape[:dim], length, *shape[dim + 1 :]), dtype=self.dtype(name))
        self.read_into(block, name, dim, start)
        return block

    def read_into(self, target: torch.Tensor, name: str, dim: int, start: int) -> None:
        """Like :meth:`read`, as many rows or columns as a contiguous tensor of the right dtype has."""
        _, shape, first, _ = self._tensors[name]
        assert target.dtype is self.dtype(name) and target.is_contiguous(), (name, target.dtype)
        assert 0 <= start <= start + target.shape[dim] <= shape[dim], (name, dim, start, target.shape, shape)
        row_bytes = math.prod(shape[1:]) * target.dtype.itemsize
        with self._path.open("rb", buffering=0) as file:
            if dim == 0:
                self._fill(file.fileno(), _bytes_of(target), self._data_start + first + start * row_bytes)
                return
            # Whole rows, of which the columns are kept: a system call for each row takes longer.
            rows = max(1, _ROWS_BYTES // row_bytes)
            for row in range(0, shape[0], rows):
                part = target[row : row + rows]
                whole = torch.empty((part.shape[0], *shape[1:]), dtype=target.dtype)
                self._fill(file.fileno(), _bytes_of(whole), self._data_start + first + row * row_bytes)
                part.copy_(whole.narrow(1, start, target.shape[1]))

    def _fill(self, descriptor: int, target: memoryview, offset: int) -> None:
        while target:  # one call reads at most 2 GiB
            count = os.preadv(descriptor, [target], offset)
            if count == 0:
                raise ValueError(f"{self._path} is damaged: it ends at byte {offset:,}")
            target, offset = target[count:], offset + count


class SafetensorsWriter:
    """Writes one file front to back.

    Args:
        path: made, or overwritten.
        shapes: of every tensor, in the order in which the blocks will come.
        dtypes: of every tensor.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + math.prod(shape) * dtypes[name].itemsize
            header[name] = {
                "dtype": _NAMES[dtypes[name]],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)

    def append(self, block: torch.Tensor) -> None:
        """Writes the next rows; the caller keeps the order that ``shapes`` has."""
        self._file.write(_bytes_of(block.contiguous()))

    def close(self) -> None:
        """Returns when the file is on the disk."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _read_header(path: Path) -> tuple[dict[str, dict], int, int]:
    """(header, where the data starts, size of the file)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"{size:,} bytes cannot hold the header")
        return json.loads(file.read(length)), _LENGTH_BYTES + length, size


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
