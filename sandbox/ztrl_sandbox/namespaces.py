"""The tiers that hide the host: namespaces, seccomp, Landlock; as root (``full``) or as anybody (``user``).

The zygote moves into a read-only root that holds the interpreter, the system's libraries and nothing else. Each
worker is the first process of a pid namespace of its own and has its own mounts, network and IPC. That is set
up once for a slot: what remains for each snippet is a fork, a change of user and, when it has ended, one
``kill(-1)`` and fresh scratch directories.

A snippet is not the first process of its namespace: the kernel would shield it from its own signals. The worker,
who is, cannot be harmed by it: the kernel ignores its signals, and the worker's death takes all of them along.
"""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ztrl_sandbox import confinement, linux
from ztrl_sandbox.isolation import (
    FIRST_SNIPPET_UID,
    SLOT_UIDS,
    Isolation,
    Slot,
    announce_scratch,
    become,
    exit_after,
    limit_processes,
)
from ztrl_sandbox.protocol import Limits
from ztrl_sandbox.scratch import remove_tree

_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS

_SCRATCH = "/snippet"
"""Where a snippet may write. No machine keeps its interpreters under this name."""
_SCRATCH_DIRECTORIES = ("work", "tmp", "shm")
_FAILED = "failed: "


class NamespaceIsolation(Isolation):
    """What ``full`` and ``user`` have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = ["mount, pid, network, IPC and UTS namespaces", "read-only root", "tmpfs scratch"]
        self.layers += ["seccomp denylist", "rlimits", "scrubbed environment"]
        if linux.landlock_abi():
            self.layers.append(f"Landlock (ABI {linux.landlock_abi()})")

    def probe(self) -> str | None:
        return confinement.missing_seccomp() or self._trial()

    def _trial(self) -> str | None:
        """Go all the way to a snippet in a forked process; why that fails, or None."""
        reader, writer = os.pipe()
        slot = Slot(index=0, limits=Limits(), scratch_root=Path())

        def reporting(step: Callable[[], object]) -> None:
            try:
                step()
            except OSError as error:
                os.write(writer, str(error).encode())

        def snippet() -> None:
            self.confine(slot)
            self.enter(slot)

        def zygote() -> None:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            self.prepare_root()
            os.waitpid(self.fork_worker(slot, lambda: reporting(snippet)), 0)

        pid = os.fork()
        if pid == 0:
            exit_after(lambda: reporting(zygote))
        os.close(writer)
        with open(reader) as answer:
            reason = answer.read()
        os.waitpid(pid, 0)
        return reason or None

    def prepare(self, scratch_root: Path) -> None:
        # This tier's scratch is a tmpfs that nobody else sees.
        shutil.rmtree(scratch_root, ignore_errors=True)
        self.prepare_root()

    def prepare_root(self) -> None:
        """In the zygote: leave the host's files, network and IPC."""
        self.enter_user_namespace()
        linux.unshare(_NAMESPACES)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        _enter_minimal_root()

    def enter_user_namespace(self) -> None:
        """Become root of a new user namespace, where the tier needs one."""

    def fork_worker(self, slot: Slot, work: Callable[[], object]) -> int:
        """Through a process in between, which ends: the zygote itself stays in its pid namespace."""
        reader, writer = os.pipe()

        def fork() -> None:
            try:
                self.enter_user_namespace()
                linux.unshare(linux.CLONE_NEWPID)
                pid = os.fork()
            except OSError as error:
                os.write(writer, f"{_FAILED}{error}".encode())
                return
            if pid == 0:
                os.close(reader)
                os.close(writer)
                exit_after(work)
            os.write(writer, str(pid).encode())

        between = os.fork()
        if between == 0:
            exit_after(fork)
        os.close(writer)
        with open(reader) as pipe:
            answer = pipe.read()
        os.waitpid(between, 0)
        if answer.startswith(_FAILED):
            raise OSError(answer.removeprefix(_FAILED))
        return int(answer)

    def confine(self, slot: Slot) -> None:
        linux.unshare(_NAMESPACES)
        flags = linux.MS_NOSUID | linux.MS_NODEV
        # Of other users' processes (the worker is one) a snippet sees nothing, in `user` of undumpable ones.
        linux.mount("proc", "/proc", "proc", flags | linux.MS_NOEXEC, "hidepid=4")
        # Where the snippet has root's user id, the settings of its own namespaces would be its to change.
        linux.mount("/proc/sys", "/proc/sys", None, linux.MS_BIND)
        linux.set_mount_attributes("/proc/sys", linux.MOUNT_ATTR_RDONLY, recursive=True)
        limits = slot.limits
        options = f"size={limits.scratch_bytes},nr_inodes={limits.scratch_inodes},mode=755"
        linux.mount("tmpfs", _SCRATCH, "tmpfs", flags, options)
        self._make_scratch(slot)
        announce_scratch(f"{_SCRATCH}/work", "/tmp" if os.path.islink("/tmp") else f"{_SCRATCH}/tmp")
        limit_processes(limits)
        # A snippet must not reach our handlers, and ignored signals stay ignored.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        confinement.install_landlock(_SCRATCH)
        confinement.install_seccomp()

    def _make_scratch(self, slot: Slot) -> None:
        for name in _SCRATCH_DIRECTORIES:
            os.mkdir(f"{_SCRATCH}/{name}", 0o700)
            self.give(f"{_SCRATCH}/{name}", slot)

    def give(self, path: str, slot: Slot) -> None:
        """Make the snippet the owner of ``path``."""

    def enter(self, slot: Slot) -> None:
        os.setsid()
        self.drop_privileges(slot)
        # The zygote is not dumpable; without it /proc/self is closed to the snippet.
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        adjustment = os.open("/proc/self/oom_score_adj", os.O_WRONLY)  # `open` would take 20 times as long
        os.write(adjustment, b"1000")  # a cgroup's limit shall never cost the worker
        os.close(adjustment)
        os.chdir(f"{_SCRATCH}/work")

    @abc.abstractmethod
    def drop_privileges(self, slot: Slot) -> None:
        """Be nobody of importance."""

    def processes(self) -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # as a rule the snippet was alone and is gone
            os.kill(-1, signal.SIGKILL)  # atomic: no fork escapes it
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def end(self, slot: Slot) -> None:
        self.kill()
        # Made anew, not emptied: modes and attributes of a directory are residue, too. A tree that cannot be
        # removed ends the worker, and its mounts with it.
        for entry in os.scandir(_SCRATCH):
            _remove(entry)
        self._make_scratch(slot)


class FullIsolation(NamespaceIsolation):
    """As root: each slot has a uid of its own."""

    name = "full"

    def __init__(self) -> None:
        super().__init__()
        self.layers.append("uid per slot")

    def probe(self) -> str | None:
        return "not root" if os.geteuid() != 0 else super().probe()

    def give(self, path: str, slot: Slot) -> None:
        os.chown(path, slot.uid, slot.uid)

    def drop_privileges(self, slot: Slot) -> None:
        become(slot.uid)


class UserIsolation(NamespaceIsolation):
    """As anybody: a user namespace for each slot, inside the zygote's; the snippet has no capabilities."""

    name = "user"

    def __init__(self) -> None:
        super().__init__()
        self.layers.append("user namespace per slot")

    def enter_user_namespace(self) -> None:
        uid, gid = os.geteuid(), os.getegid()
        linux.prctl(linux.PR_SET_DUMPABLE, 1)  # else the files below are not ours
        linux.unshare(linux.CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path("/proc/self", name).write_text(line)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)

    def drop_privileges(self, slot: Slot) -> None:
        # The user id stays root's of this namespace, and loses all that it stands for.
        linux.prctl(linux.PR_SET_SECUREBITS, linux.SECBIT_NOROOT_LOCKED)
        linux.drop_capabilities()

    def end(self, slot: Slot) -> None:
        super().end(slot)
        # The snippet has the same user id as we, so this directory, too, was its own.
        os.chmod(_SCRATCH, 0o755)
        for name in os.listxattr(_SCRATCH):
            os.removexattr(_SCRATCH, name)


def _remove(entry: os.DirEntry[str]) -> None:
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry)
        return
    try:
        os.rmdir(entry)  # as a rule it is empty
    except OSError:
        remove_tree(Path(entry))


def _enter_minimal_root() -> None:
    """Make ``/`` (of this mount namespace) a read-only tree of interpreter, libraries and a few devices."""
    # To mount on while the tree is built: it exists everywhere and nothing below is needed.
    root = Path("/sys")
    linux.mount("tmpfs", str(root), "tmpfs", linux.MS_NOSUID, "size=1m,mode=755")
    for name in ("bin", "lib", "lib32", "lib64"):
        source = Path("/") / name
        if source.is_symlink():
            (root / name).symlink_to(os.readlink(source))
        elif source.is_dir():
            _bind_read_only(source, root)
    for path in _without_nested([Path("/usr"), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]):
        _bind_read_only(path, root)
    (root / "dev").mkdir(exist_ok=True)
    for name in ("null", "zero", "full", "random", "urandom"):
        (root / "dev" / name).touch()
        linux.mount(f"/dev/{name}", str(root / "dev" / name), None, linux.MS_BIND)
    for name in ("proc", "etc", _SCRATCH.removeprefix("/")):
        (root / name).mkdir(exist_ok=True)
    linux.mount("/proc", str(root / "proc"), None, linux.MS_BIND | linux.MS_REC)
    uids = [0, *range(FIRST_SNIPPET_UID, FIRST_SNIPPET_UID + SLOT_UIDS)]
    users = [f"snippet{uid}:x:{uid}:{uid}::{_SCRATCH}/work:/bin/sh\n" for uid in uids]
    (root / "etc" / "passwd").write_text("".join(users))
    if Path("/etc/ld.so.cache").exists():
        shutil.copyfile("/etc/ld.so.cache", root / "etc" / "ld.so.cache")
    if not (root / "tmp").exists():  # it does when the interpreter lies in there; then TMPDIR names another
        (root / "tmp").symlink_to(f"{_SCRATCH}/tmp")
    (root / "dev" / "shm").symlink_to(f"{_SCRATCH}/shm")
    attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID
    linux.set_mount_attributes(str(root), attributes, recursive=False)
    os.chdir(root)
    linux.mount(".", "/", None, linux.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _bind_read_only(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    target.mkdir(parents=True)
    linux.mount(str(path), str(target), None, linux.MS_BIND | linux.MS_REC)
    attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
    linux.set_mount_attributes(str(target), attributes, recursive=True)


def _without_nested(paths: Sequence[Path]) -> list[Path]:
    """``paths`` less those that lie inside another, without repeats."""
    unique = sorted(set(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]
