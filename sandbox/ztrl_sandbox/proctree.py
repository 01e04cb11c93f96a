"""A process's descendants, what they use, and how to end them all."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> str:
    """A /proc file's text; empty when the process has just gone."""
    try:
        with open(path) as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(pid: int) -> list[int]:
    """Direct children, zombies included."""
    # A child is listed under the thread that forked it.
    return [
        int(child)
        for thread in _threads(pid)
        for child in _read(f"/proc/{pid}/task/{thread}/children").split()
    ]


def descendants(root: int) -> list[int]:
    """Every process below ``root``."""
    found: list[int] = []
    frontier = [root]
    while frontier:
        below = children(frontier.pop())
        found += below
        frontier += below
    return found


def resident_bytes(pid: int) -> int:
    """Resident set of one process, shared pages counted in full; 0 when it has gone."""
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if fields else 0


def proportional_bytes(pid: int) -> int:
    """Resident set of one process, each shared page divided by its sharers; 0 when it has gone. Slow (ms)."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_resident_bytes(pid: int) -> int:
    """Largest resident set of one process so far; 0 when it has gone."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of the children it waited for; 0 when it has gone."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def count_tasks(pids: list[int]) -> int:
    """Threads of all these processes together."""
    return sum(len(_threads(pid)) for pid in pids)


def kill_children(spare: Collection[int] = ()) -> None:
    """Kill and reap every descendant of the calling process, which must be a child subreaper.

    Orphans fall to the subreaper, so the loop ends only when nothing is left, however they were detached.
    Children in ``spare``, and all below them, are left alone.
    """
    me = os.getpid()
    while strays := [pid for pid in children(me) if pid not in spare]:
        for pid in [*strays, *(below for stray in strays for below in descendants(stray))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended between the scan and the signal
        for pid in strays:
            os.waitpid(pid, 0)
