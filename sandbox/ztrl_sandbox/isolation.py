"""Isolation tiers: what separates a snippet from the host and from its neighbours.

A tier acts at four moments: ``prepare`` (once, in the zygote), ``fork`` (in the worker), ``enter`` (in the
forked child, before it sees any code) and ``end`` (in the worker, after the snippet's main process is gone or
must go). Adding a tier means adding a class here.
"""

from __future__ import annotations

import abc
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ztrl_sandbox import linux, proctree
from ztrl_sandbox.protocol import Limits

FIRST_SNIPPET_UID = 61000
"""Host uid of slot 0; slot k runs as this + k, so that RLIMIT_NPROC counts each slot by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """What a worker knows of itself."""

    index: int
    limits: Limits
    scratch_root: Path
    """A directory of this server, removed when it stops."""

    @property
    def uid(self) -> int:
        return FIRST_SNIPPET_UID + self.index

    @property
    def scratch_dir(self) -> Path:
        """On the host file system; used only by a tier without a scratch mount."""
        return self.scratch_root / f"slot-{self.index}"


_ZYGOTE_NAMESPACES = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS


class Isolation(abc.ABC):
    """One tier."""

    name: str

    @abc.abstractmethod
    def prepare(self, scratch_root: Path) -> None:
        """In the zygote, once, before it forks a worker."""

    @abc.abstractmethod
    def fork(self, slot: Slot) -> int:
        """In the worker: ``os.fork`` the process that will run one snippet."""

    @abc.abstractmethod
    def enter(self, slot: Slot) -> None:
        """In the forked child: give up what the snippet must not have; enter an empty directory."""

    def end(self, slot: Slot) -> None:
        """In the worker: leave no process and no file of the snippet."""
        proctree.kill_children()


def _drop_privileges(uid: int, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def _use_scratch(work_dir: Path, temporary_dir: Path) -> None:
    os.chdir(work_dir)
    os.environ["HOME"] = str(work_dir)
    os.environ["TMPDIR"] = str(temporary_dir)
    tempfile.tempdir = None  # forget what a preloaded module may have looked up


class BasicIsolation(Isolation):
    """Resource limits, a session of its own, a scratch directory; another uid where that is possible.

    It does not hide the host's files, network or processes.
    """

    name = "basic"

    def __init__(self) -> None:
        self._change_uid = os.geteuid() == 0 and _readable_by_everyone(sys.prefix, sys.base_prefix)

    def prepare(self, scratch_root: Path) -> None:
        pass  # the slots make their own directories

    def fork(self, slot: Slot) -> int:
        slot.scratch_dir.mkdir(mode=0o700)
        if self._change_uid:
            os.chown(slot.scratch_dir, slot.uid, slot.uid)
        return os.fork()

    def enter(self, slot: Slot) -> None:
        worker = os.getppid()
        os.setsid()
        if self._change_uid:
            _drop_privileges(slot.uid, slot.limits)
        linux.prctl(
            linux.PR_SET_DUMPABLE, 1
        )  # the zygote is not; without it /proc/self is closed to the snippet
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(1)  # the worker died before the line above took effect
        _use_scratch(slot.scratch_dir, slot.scratch_dir)

    def end(self, slot: Slot) -> None:
        super().end(slot)
        shutil.rmtree(slot.scratch_dir)


_SCRATCH = "/snippet"
"""Where a snippet of the namespace tier may write. No machine keeps its interpreters under this name."""


class NamespaceIsolation(Isolation):
    """Needs root with CAP_SYS_ADMIN: mount, pid, network, IPC and UTS namespaces, and a uid per slot.

    The zygote moves into a read-only root that holds the interpreter and the system's libraries and nothing
    else. Each snippet gets its own pid namespace, /proc and size-limited scratch tmpfs. The first process of
    the pid namespace is a ``cat`` that reads a pipe from the worker: killing it, or the worker's death, makes
    the kernel kill everything in the namespace at once. (Were the snippet itself the first process, the
    kernel would shield it from its own signals.)
    """

    name = "namespaces"

    def __init__(self) -> None:
        self._cat = shutil.which("cat", path="/usr/bin:/bin")
        self._own_pid_namespace = -1
        self._init_pid = -1
        self._lifeline = -1
        """Write end of the pipe that keeps ``cat`` alive."""

    def probe(self) -> str | None:
        """Why this tier cannot be used here; None when it can."""
        if os.geteuid() != 0:
            return "not root"
        if self._cat is None:
            return "no `cat` in /usr/bin or /bin"
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                linux.unshare(_ZYGOTE_NAMESPACES)
                linux.unshare(linux.CLONE_NEWPID)
                linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
                linux.mount("tmpfs", "/tmp", "tmpfs", 0)
                os.setgroups([])
            except OSError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            reason = answer.read()
        os.waitpid(pid, 0)
        return reason or None

    def prepare(self, scratch_root: Path) -> None:
        shutil.rmtree(
            scratch_root, ignore_errors=True
        )  # this tier's scratch is a tmpfs that nobody else sees
        self._own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        linux.unshare(_ZYGOTE_NAMESPACES)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        _enter_minimal_root()

    def fork(self, slot: Slot) -> int:
        linux.setns(self._own_pid_namespace, linux.CLONE_NEWPID)
        linux.unshare(linux.CLONE_NEWPID)
        assert self._cat is not None
        reader, self._lifeline = os.pipe()
        null = os.open("/dev/null", os.O_WRONLY)
        streams = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((reader, null, null))]
        self._init_pid = os.posix_spawn(self._cat, ["cat"], {}, file_actions=streams)
        os.close(reader)
        os.close(null)
        return os.fork()

    def enter(self, slot: Slot) -> None:
        os.setsid()
        # IPC too: System V objects must not outlive the snippet or reach a neighbour.
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
        limits = slot.limits
        options = f"size={limits.scratch_bytes},nr_inodes={limits.scratch_inodes},mode=700"
        options += f",uid={slot.uid},gid={slot.uid}"
        linux.mount("tmpfs", _SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        _drop_privileges(slot.uid, limits)
        linux.prctl(linux.PR_SET_DUMPABLE, 1)  # changing uid cleared it, and with it access to /proc/self
        for name in ("work", "tmp", "shm"):
            os.mkdir(f"{_SCRATCH}/{name}")
        _use_scratch(
            Path(_SCRATCH, "work"), Path("/tmp") if os.path.islink("/tmp") else Path(_SCRATCH, "tmp")
        )

    def end(self, slot: Slot) -> None:
        os.kill(self._init_pid, signal.SIGKILL)  # the kernel kills the rest of the pid namespace at once
        super().end(slot)  # reaps; the first process is gone only when the whole namespace is
        os.close(self._lifeline)


def _readable_by_everyone(*paths: str) -> bool:
    return all(
        os.stat(part).st_mode & 0o005 == 0o005 for path in paths for part in [Path(path), *Path(path).parents]
    )


def _enter_minimal_root() -> None:
    """Make ``/`` (of this mount namespace) a read-only tree of interpreter, libraries and a few devices."""
    root = Path(
        "/sys"
    )  # to mount on while the tree is built: it exists everywhere and nothing below is needed
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
    uids = range(FIRST_SNIPPET_UID, FIRST_SNIPPET_UID + 256)
    users = [f"snippet{uid}:x:{uid}:{uid}::{_SCRATCH}/work:/bin/sh\n" for uid in uids]
    (root / "etc" / "passwd").write_text("".join(users))
    if Path("/etc/ld.so.cache").exists():
        shutil.copyfile("/etc/ld.so.cache", root / "etc" / "ld.so.cache")
    if not (root / "tmp").exists():  # it does when the interpreter lies in there; then TMPDIR names another
        (root / "tmp").symlink_to(f"{_SCRATCH}/tmp")
    (root / "dev" / "shm").symlink_to(f"{_SCRATCH}/shm")
    linux.mount("none", str(root), None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID)
    os.chdir(root)
    linux.mount(".", "/", None, linux.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _bind_read_only(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    target.mkdir(parents=True)
    linux.mount(str(path), str(target), None, linux.MS_BIND | linux.MS_REC)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("none", str(target), None, flags)


def _without_nested(paths: Sequence[Path]) -> list[Path]:
    """``paths`` less those that lie inside another, without repeats."""
    unique = sorted(set(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]


def choose(requested: str) -> tuple[Isolation, str]:
    """The tier to use and why; ``requested`` is ``auto``, ``namespaces`` or ``basic``.

    Raises:
        ValueError: ``requested`` is unknown, or this machine cannot provide it.
    """
    if requested == "basic":
        return BasicIsolation(), "requested"
    if requested not in ("auto", "namespaces"):
        raise ValueError(f"isolation: unknown tier {requested!r}; use auto, namespaces or basic")
    tier = NamespaceIsolation()
    obstacle = tier.probe()
    if obstacle is None:
        return tier, "strongest available" if requested == "auto" else "requested"
    if requested == "namespaces":
        raise ValueError(f"isolation: namespaces are not available here ({obstacle}); use auto or basic")
    return BasicIsolation(), f"namespaces are not available: {obstacle}"
