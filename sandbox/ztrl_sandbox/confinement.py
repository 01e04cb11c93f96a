"""What no process of a slot may do: a seccomp denylist and Landlock rules.

Put on the worker once; every snippet inherits them with the fork, which costs it nothing.
"""

from __future__ import annotations

import errno
import os

from ztrl_sandbox import linux

_DENIED = (
    "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp mount "
    "umount2 pivot_root chroot mount_setattr move_mount open_tree fsopen fsconfig fsmount fspick unshare "
    "setns io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents name_to_handle_at "
    "open_by_handle_at quotactl quotactl_fd fanotify_init keyctl add_key request_key bpf perf_event_open "
    "userfaultfd lookup_dcookie io_uring_setup io_uring_enter io_uring_register init_module finit_module "
    "delete_module kexec_load kexec_file_load reboot swapon swapoff acct syslog settimeofday "
    "clock_settime clock_adjtime adjtimex sethostname setdomainname vhangup iopl ioperm modify_ldt "
    "personality uselib ioprio_set move_pages migrate_pages mbind set_mempolicy shmget shmat shmctl shmdt "
    "semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink memfd_create "
    "memfd_secret "
)
"""Kernel surface that mathematics does not need, and memory that no limit of ours would count.

A denylist that answers EPERM: an allowlist kills honest programs with SIGSYS whenever a library changes.
"""

_ONLY_ON_ITSELF = {
    "prlimit64": 0,
    "sched_setaffinity": 0,
    "sched_setattr": 0,
    "sched_setparam": 0,
    "sched_setscheduler": 0,
    "setpriority": 1,
}
"""Call → the argument that names a process; another than 0 (the caller) could be the worker."""

_NAMESPACE_FLAGS = (
    linux.CLONE_NEWNS,
    linux.CLONE_NEWUTS,
    linux.CLONE_NEWIPC,
    linux.CLONE_NEWUSER,
    linux.CLONE_NEWPID,
    linux.CLONE_NEWNET,
)

_UNKNOWN_SYSCALL = -1
"""To this libseccomp; what is newer than it is newer than most kernels, too."""

_AF_INET6 = 10
_OTHER_OLD_FAMILIES = range(3, _AF_INET6)
"""Socket families between AF_INET (2) and AF_INET6."""


def install_seccomp() -> None:
    """Deny the caller and its future children ``_DENIED`` and the like; needs no_new_privs or privilege.

    Raises:
        RuntimeError: libseccomp is not installed.
    """
    import pyseccomp as seccomp

    deny = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in _DENIED.split():
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) != _UNKNOWN_SYSCALL:
            rules.add_rule(deny, name)
    for name, index in _ONLY_ON_ITSELF.items():
        rules.add_rule(deny, name, seccomp.Arg(index, seccomp.NE, 0))
    for flag in _NAMESPACE_FLAGS:
        rules.add_rule(deny, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    # clone3's flags lie in memory, where a filter cannot look; without it libc falls back to clone.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(deny, "socket", seccomp.Arg(0, seccomp.GT, _AF_INET6))
    for family in _OTHER_OLD_FAMILIES:
        rules.add_rule(deny, "socket", seccomp.Arg(0, seccomp.EQ, family))
    rules.load()


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = (
    1 << bit for bit in (0, 1, 2, 3, 14, 15)
)
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FS_ACCESSES_BY_ABI = (0, 13, 14, 15, 15, 16)
"""How many access bits each Landlock version knows; later ones know as many as the last."""
_SCOPE_ABI = 6
_SCOPE_ALL = 0b11
"""Abstract sockets and signals stay among the processes that share the restriction."""


def install_landlock(writable: str) -> bool:
    """Leave ``writable`` to the caller and its future children, the rest of the tree for reading.

    Returns:
        Whether the kernel has Landlock; without it the mounts alone decide.
    """
    abi = linux.landlock_abi()
    if abi == 0:
        return False
    handled = (1 << _FS_ACCESSES_BY_ABI[min(abi, len(_FS_ACCESSES_BY_ABI) - 1)]) - 1
    device = (_READ | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & handled
    allowed = {
        "/": _READ,
        "/dev": device,
        "/proc": (_READ | _WRITE_FILE | _TRUNCATE) & handled,
        writable: handled,
    }
    linux.landlock(handled, _SCOPE_ALL if abi >= _SCOPE_ABI else 0, allowed)
    return True


def missing_seccomp() -> str | None:
    """Why seccomp cannot be used here; None when it can."""
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return f"pyseccomp with libseccomp is not installed ({error})"
    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        return "the kernel has no seccomp filters"
    return None
