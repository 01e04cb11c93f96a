"""Files that a caller puts into a snippet's working directory, and fetches from it when the snippet has ended.

The server never opens a path of the scratch directory: a process of the slot, which has no more rights than the
snippet, writes and reads there. The two hand each other memory files, each a sequence of (path, content).
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence

MAX_FILES = 1024
"""That one call may give, and that it may ask for."""
_MAX_PATH_BYTES = 1024

_ENTRY = struct.Struct("<QQ")
"""Before each entry: the bytes of its path and of its content."""
_REMARKS = ""
"""In place of a path, in the last entry of what is fetched: which files are not there, and why."""

_CHUNK_BYTES = 1 << 20
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def path_parts(path: str) -> list[str]:
    """The names that lead from the working directory to a file.

    Raises:
        ValueError: the path is no file's in or below the working directory; the message says why.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    try:
        too_long = len(path.encode()) > _MAX_PATH_BYTES
    except UnicodeEncodeError:
        raise ValueError(f"the path {path!r} is no valid Unicode") from None
    if too_long:
        raise ValueError(f"the path {path[:40]!r}... has more than {_MAX_PATH_BYTES} bytes")
    if not parts or path.endswith(("/", "/.")):
        raise ValueError(f"the path {path!r} names no file")
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(
            f"the path {path!r} is refused: it must be relative to the working directory, without '..' and NUL"
        )
    return parts


def memory_file(*chunks: bytes) -> int:
    """Descriptor of a file without a name that holds ``chunks``; it is read from its beginning."""
    fd = os.memfd_create("request", os.MFD_CLOEXEC)
    for chunk in chunks:
        _write(fd, chunk)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def pack(files: Mapping[str, bytes]) -> int:
    """In the server: a memory file for :func:`unpack`."""
    return memory_file(
        *(chunk for path, content in files.items() for chunk in (_head(path, len(content)), content))
    )


def unpack(packed: int) -> None:
    """In the snippet's process, before its code comes: write the files into the working directory.

    Raises:
        OSError: a file cannot be written: no space is left, or another's path leads through it.
    """
    for path, offset, size_bytes in _entries(packed):
        parts = path_parts(path)
        if len(parts) > 1:
            os.makedirs("/".join(parts[:-1]), exist_ok=True)
        file = os.open("/".join(parts), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _copy(packed, offset, size_bytes, file)
        finally:
            os.close(file)


def collect(wanted: int, limit_bytes: int, collected: int) -> None:
    """In a process with the snippet's rights, after its end: copy what is wanted to ``collected``.

    Links are not followed, and only regular files are opened: nobody is waited for at the other end of a pipe.

    Args:
        wanted: Holds the paths.
        limit_bytes: For all contents together. What does not fit is left out.
        collected: A memory file, which :class:`Collection` reads.
    """
    remarks = []
    room_bytes = limit_bytes
    for path in json.loads(os.pread(wanted, os.fstat(wanted).st_size, 0)):
        try:
            file = _open_beneath(path_parts(path))
        except FileNotFoundError:
            continue
        except OSError as error:
            remarks.append(f"{path}: {error.strerror}")
            continue
        size_bytes = os.fstat(file).st_size
        if size_bytes > room_bytes:
            remarks.append(
                f"{path}: {size_bytes} bytes, with those before it more than the limit of {limit_bytes}"
            )
        else:
            _write(collected, _head(path, size_bytes))
            _copy(file, 0, size_bytes, collected)
            room_bytes -= size_bytes
        os.close(file)
    text = "; ".join(remarks).encode()
    _write(collected, _head(_REMARKS, len(text)) + text)


class Collection:
    """In the server: what is to be fetched from one snippet.

    Args:
        paths: Of the files; each has passed :func:`path_parts`.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.fds = (memory_file(json.dumps(list(dict.fromkeys(paths))).encode()), memory_file())
        """For :func:`collect`: what is wanted, and where it goes."""

    def finish(self) -> tuple[dict[str, bytes], str]:
        """The contents of the files that were there, and which others are missing for what reason. Call it once."""
        _, collected = self.fds
        files = {
            path: os.pread(collected, size_bytes, offset) for path, offset, size_bytes in _entries(collected)
        }
        for fd in self.fds:
            os.close(fd)
        if _REMARKS not in files:  # its process was killed
            return {}, "the files could not be fetched"
        remarks = files.pop(_REMARKS).decode("utf-8", "replace")
        return files, f"not fetched: {remarks}" if remarks else ""


def _open_beneath(parts: Sequence[str]) -> int:
    """Open a regular file for reading, following no link on the way to it."""
    directory = os.open(".", _DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(0, "not a regular file")
        return os.open(
            parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
        )
    finally:
        os.close(directory)


def _head(path: str, size_bytes: int) -> bytes:
    name = path.encode()
    return _ENTRY.pack(len(name), size_bytes) + name


def _entries(packed: int) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of each content that is there in full."""
    end, offset = os.fstat(packed).st_size, 0
    while offset + _ENTRY.size <= end:
        path_bytes, size_bytes = _ENTRY.unpack(os.pread(packed, _ENTRY.size, offset))
        content = offset + _ENTRY.size + path_bytes
        if content + size_bytes > end:
            return
        yield os.pread(packed, path_bytes, offset + _ENTRY.size).decode(), content, size_bytes
        offset = content + size_bytes


def _copy(source: int, offset: int, size_bytes: int, target: int) -> None:
    end = offset + size_bytes
    while offset < end:
        copied_bytes = os.sendfile(target, source, offset, min(_CHUNK_BYTES, end - offset))
        if copied_bytes == 0:
            raise OSError(0, "the file is shorter than it says")
        offset += copied_bytes


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
