"""Size and checksum of files, so that a checkpoint is loaded as it was written or not at all."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20
READERS = 8
"""Threads that read files to check them; ``crc32`` and file reads let go of Python's lock."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    crc32: int


def seal(path: Path) -> FileRecord:
    """Forces a written file to the disk, and returns its record."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _record(path)


def seal_directory(path: Path) -> None:
    """Forces the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(directory: Path, records: dict[str, FileRecord]) -> str | None:
    """The first file that is not as its record says, and in what way; None when all are.

    Args:
        directory: Where the files are.
        records: By path in ``directory``.
    """
    with ThreadPoolExecutor(READERS) as readers:
        damage = readers.map(lambda item: _damage(directory / item[0], item[1]), records.items())
        return next((found for found in damage if found), None)


def _damage(path: Path, expected: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{path} has {size} bytes where {expected.bytes} were written"
    if _record(path) != expected:
        return f"{path} has been altered: its checksum is not the one that was written"
    return None


def _record(path: Path) -> FileRecord:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            size += len(chunk)
    return FileRecord(bytes=size, crc32=checksum)
