"""The few Linux calls that Python 3.11 does not wrap. Each raises ``OSError`` on failure."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECUREBITS = 28
SECBIT_NOROOT_LOCKED = 0b11
"""User id 0 gains nothing from being 0, for good."""

_SYS_MOUNT_SETATTR = 442
_SYS_LANDLOCK = (444, 445, 446)
"""create_ruleset, add_rule, restrict_self; these numbers are the same on every architecture."""
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

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


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """``mount(2)``."""
    options = None if data is None else data.encode()
    encoded = [None if text is None else text.encode() for text in (source, target, fstype)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), options), f"mount {target}")


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def set_mount_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    """``mount_setattr(2)``: add attributes to a mount (and all below it), whatever others it has."""
    attr = _MountAttr(attr_set=attributes)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            target.encode(),
            _AT_RECURSIVE if recursive else 0,
            ctypes.byref(attr),
            ctypes.c_size_t(ctypes.sizeof(attr)),
        ),
        f"mount_setattr {target}",
    )


def prctl(option: int, value: int) -> None:
    """``prctl(2)`` for options with one argument."""
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), unused, unused, unused), f"prctl({option})")


def drop_capabilities() -> None:
    """Give up every capability of the caller, for good once ``PR_SET_NO_NEW_PRIVS`` is set."""
    version_3 = 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, none), "capset")


class _RulesetAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("handled_fs", "handled_net", "scoped")]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    version = _libc.syscall(_SYS_LANDLOCK[0], None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, version)


def landlock(handled: int, scoped: int, allowed: dict[str, int]) -> None:
    """Restrict the caller and its future children for good; needs ``PR_SET_NO_NEW_PRIVS``.

    Args:
        handled: File-system accesses that are denied unless allowed.
        scoped: Kinds of contact with processes outside that are denied.
        allowed: Path to the accesses that stay allowed below it.
    """
    attr = _RulesetAttr(handled_fs=handled, scoped=scoped)
    size = ctypes.c_size_t(ctypes.sizeof(attr) if scoped else 8)  # older kernels know the first field only
    ruleset = _libc.syscall(_SYS_LANDLOCK[0], ctypes.byref(attr), size, 0)
    _check(min(0, ruleset), "landlock_create_ruleset")
    try:
        for path, accesses in allowed.items():
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = _PathBeneath(allowed=accesses, parent_fd=fd)
                _check(
                    _libc.syscall(
                        _SYS_LANDLOCK[1], ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0
                    ),
                    f"landlock_add_rule {path}",
                )
            finally:
                os.close(fd)
        _check(_libc.syscall(_SYS_LANDLOCK[2], ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


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
