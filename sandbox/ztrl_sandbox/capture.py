"""Output capture with a cap: the beginning and the end of a stream are kept, and the cut is stated."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable

_READ_BYTES = 1 << 16
_UNWATCHED_SECONDS = 0.02
"""Most snippets have ended by then, and what they wrote lies in the pipe: watching it would only cost time."""


class CappedOutput:
    """The first and last halves of ``limit_bytes`` of a byte stream."""

    def __init__(self, limit_bytes: int) -> None:
        self._half_bytes = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total_bytes = 0

    def feed(self, data: bytes) -> None:
        """Append ``data``."""
        self.total_bytes += len(data)
        room = self._half_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half_bytes + _READ_BYTES:
            self._shorten_tail()

    def _shorten_tail(self) -> None:
        del self._tail[: max(0, len(self._tail) - self._half_bytes)]

    @property
    def truncated(self) -> bool:
        """Whether anything was dropped."""
        return self.total_bytes > 2 * self._half_bytes

    def text(self) -> str:
        """As UTF-8; invalid bytes become U+FFFD, and a character that the cut split is dropped."""
        if not self.truncated:
            return (self._head + self._tail).decode("utf-8", "replace")
        self._shorten_tail()
        cut_bytes = self.total_bytes - len(self._head) - len(self._tail)
        head = _without_partial_end(bytes(self._head)).decode("utf-8", "replace")
        tail = _without_partial_start(bytes(self._tail)).decode("utf-8", "replace")
        return f"{head}\n... [{cut_bytes} bytes of output cut] ...\n{tail}"


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _without_partial_start(data: bytes) -> bytes:
    start = 0
    while start < min(3, len(data)) and _is_continuation(data[start]):
        start += 1
    return data[start:]


def _without_partial_end(data: bytes) -> bytes:
    for length in range(1, min(4, len(data) + 1)):
        lead = data[-length]
        if _is_continuation(lead):
            continue
        expected = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
        return data[:-length] if expected > length else data
    return data


class PipeReader:
    """Reads a pipe into a :class:`CappedOutput` from the event loop, from ``_UNWATCHED_SECONDS`` on or at the end."""

    def __init__(self, limit_bytes: int, flood_bytes: int, on_flood: Callable[[], None]) -> None:
        self.output = CappedOutput(limit_bytes)
        self._flood_bytes = flood_bytes
        self._on_flood = on_flood
        self._loop = asyncio.get_running_loop()
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._begin: asyncio.TimerHandle | None = self._loop.call_later(_UNWATCHED_SECONDS, self._watch)

    @property
    def flooded(self) -> bool:
        """Whether more came than a snippet may write."""
        return self.output.total_bytes > self._flood_bytes

    def close_write_end(self) -> None:
        """Call once the snippet has its copy."""
        os.close(self.write_fd)

    def _watch(self) -> None:
        self._begin = None
        self._loop.add_reader(self._read_fd, self._read)

    def _unwatch(self) -> None:
        if self._begin is None:
            self._loop.remove_reader(self._read_fd)
        else:
            self._begin.cancel()

    def _read(self) -> bool:
        """One read. False when nothing is left for now."""
        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._unwatch()
            return False
        was_flooded = self.flooded
        self.output.feed(data)
        if self.flooded and not was_flooded:
            self._on_flood()
        return True

    def finish(self) -> None:
        """Take what is in the pipe by now and close it.

        Not more than fits into it: a process that a session left behind may be writing without end.
        """
        unread_bytes = fcntl.fcntl(self._read_fd, fcntl.F_GETPIPE_SZ)
        while unread_bytes > 0 and self._read():
            unread_bytes -= _READ_BYTES
        self._unwatch()
        os.close(self._read_fd)
