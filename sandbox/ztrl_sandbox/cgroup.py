"""Memory cgroups, where the server may make them: the kernel then counts every page of a slot, mapped or not.

The server makes one cgroup for each slot (``MemoryCgroups``) and hands its directory to the worker, which joins
it before it forks anything (``SlotMemory``). Both versions of the interface are spoken; in version 2 the
server's own cgroup must be delegated to it and hold no process but through children.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

WORKER_OVERHEAD_BYTES = 48 << 20
"""Allowed on top of a snippet's memory: what the worker writes, page tables, the room for a last traceback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Interface:
    limit: str
    events: str
    no_swap: tuple[str, str]


_V1 = _Interface(
    limit="memory.limit_in_bytes", events="memory.oom_control", no_swap=("memory.swappiness", "0")
)
_V2 = _Interface(limit="memory.max", events="memory.events", no_swap=("memory.swap.max", "0"))


class MemoryCgroups:
    """The cgroups of one server, below the one that it runs in.

    Raises:
        OSError: this machine does not let the caller make any; the message says why.
    """

    def __init__(self) -> None:
        parent, version = _own_cgroup()
        if version == 2:
            (parent / "cgroup.subtree_control").write_text("+memory")
        self.name = f"ztrl-sandbox-{os.getpid()}"
        self.parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        """Directory that ``name`` is in; with it the zygote can remove what a killed server leaves."""
        self._root = parent / self.name
        try:
            self._root.mkdir()
            if version == 2:
                (self._root / "cgroup.subtree_control").write_text("+memory")
            os.close(self.open_slot(0))
        except OSError:
            self.close()
            raise

    def open_slot(self, index: int) -> int:
        """Make the slot's cgroup unless it exists. Returns a descriptor of its directory."""
        directory = self._root / f"slot-{index}"
        directory.mkdir(exist_ok=True)
        return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def remove_slot(self, index: int) -> None:
        """Remove the slot's cgroup; no process may be left inside."""
        with contextlib.suppress(FileNotFoundError):
            (self._root / f"slot-{index}").rmdir()

    def close(self) -> None:
        """Remove all of them; no process may be left inside."""
        remove(self.parent_fd, self.name)
        os.close(self.parent_fd)


def remove(parent_fd: int, name: str) -> None:
    """Remove the cgroups of a server, if they are there."""
    with contextlib.suppress(FileNotFoundError):
        root = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent_fd)
        try:
            for entry in os.listdir(root):
                if entry.startswith("slot-"):
                    os.rmdir(entry, dir_fd=root)
        finally:
            os.close(root)
        os.rmdir(name, dir_fd=parent_fd)


class SlotMemory:
    """A slot's cgroup as its worker sees it; the constructor moves the worker in."""

    def __init__(self, directory: int) -> None:
        interface = _V1 if _exists(directory, _V1.limit) else _V2
        file, value = interface.no_swap
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
            _write(directory, file, value)
        _write(directory, "cgroup.procs", "0")
        self._limit = _open(directory, interface.limit, os.O_WRONLY)
        self._events = _open(directory, interface.events, os.O_RDONLY)
        self._limit_bytes = 0

    def limit(self, memory_bytes: int) -> None:
        """Cap what the slot's processes use together."""
        if memory_bytes != self._limit_bytes:
            os.pwrite(self._limit, str(memory_bytes + WORKER_OVERHEAD_BYTES).encode(), 0)
            self._limit_bytes = memory_bytes

    def oom_kills(self) -> int:
        """How many processes the kernel has killed for the limit so far."""
        for line in os.pread(self._events, 4096, 0).decode().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        raise RuntimeError("the cgroup does not count its oom kills")


def _own_cgroup() -> tuple[Path, int]:
    """The directory of this process's memory cgroup, and the version of its interface."""
    controllers: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        controllers |= dict.fromkeys(names.split(","), path.lstrip("/"))
    for root, controller, version in (("/sys/fs/cgroup/memory", "memory", 1), ("/sys/fs/cgroup", "", 2)):
        if controller in controllers:
            directory = Path(root) / controllers[controller]
            if (directory / "cgroup.procs").exists():
                return directory, version
    raise OSError(errno.ENOENT, "no memory cgroup is mounted")


def _exists(directory: int, name: str) -> bool:
    return os.access(name, os.F_OK, dir_fd=directory)


def _open(directory: int, name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CLOEXEC, dir_fd=directory)


def _write(directory: int, name: str, value: str) -> None:
    fd = _open(directory, name, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
