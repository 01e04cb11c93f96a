"""The few Linux calls that Python 3.11 does not wrap. Each raises ``OSError`` on failure."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_MADV_COLLAPSE = 25
_HUGE_PAGE_BYTES = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    """Move the caller into new namespaces (``CLONE_NEWPID`` affects its future children only)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Join the namespace that ``fd`` refers to."""
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """``mount(2)``."""
    options = None if data is None else data.encode()
    encoded = [None if text is None else text.encode() for text in (source, target, fstype)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options), f"mount {target}")


def prctl(option: int, value: int) -> None:
    """``prctl(2)`` for options with one argument."""
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), unused, unused, unused), f"prctl({option})")


def collapse_writable_memory() -> None:
    """Back private writable memory with huge pages where the kernel can (``MADV_COLLAPSE``, Linux 6.1).

    Copying page tables dominates a fork of an interpreter with sympy loaded; huge pages halve it. A region
    that cannot be collapsed stays as it is: this changes speed, never behaviour.
    """
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    for fields in lines:
        anonymous = len(fields) == 5 or fields[5] == "[heap]"
        if not anonymous or fields[1] != "rw-p":
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        start = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        end = end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if end > start:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)
