"""Isolation tiers: what separates a snippet from the host and from its neighbours.

A tier acts at six moments: ``prepare`` (once, in the zygote), ``fork_worker`` (in the zygote), ``confine``
(once, in the worker), ``enter`` (in each forked snippet process, before it sees any code), ``kill`` and ``end``
(in the worker, after the snippet's main process is gone or must go). Adding a tier means adding a class.
"""

from __future__ import annotations

import abc
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ztrl_sandbox import linux, proctree
from ztrl_sandbox.protocol import Limits
from ztrl_sandbox.scratch import remove_tree

SLOT_UIDS = 512
"""User ids that belong to one server."""
_HIGH_UIDS = 1_900_000_000
"""Above what systemd and user namespaces hand out."""
_LOW_UIDS = 61_000
"""Where only 65,536 ids exist, as in many containers."""


def _first_snippet_uid() -> int:
    with open("/proc/self/uid_map") as lines:
        ids = max(int(line.split()[2]) for line in lines)
    server = os.getppid()
    if ids > 1 << 31:
        return _HIGH_UIDS + server % (1 << 17) * SLOT_UIDS
    return _LOW_UIDS + server % 8 * SLOT_UIDS


FIRST_SNIPPET_UID = _first_snippet_uid()
"""Host uid of slot 0; slot k runs as this + k. The kernel counts processes by user (RLIMIT_NPROC): no two slots
may share one, nor two servers. Right in the zygote, the server's child, and in what it forks.
"""


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


class Isolation(abc.ABC):
    """One tier."""

    name: str

    def __init__(self) -> None:
        self.layers: list[str] = []
        """What is in force, for people to read; complete after ``probe``."""

    @abc.abstractmethod
    def probe(self) -> str | None:
        """Why this tier cannot be used here; None when it can."""

    @abc.abstractmethod
    def prepare(self, scratch_root: Path) -> None:
        """In the zygote, once, before it forks a worker."""

    @abc.abstractmethod
    def fork_worker(self, slot: Slot, work: Callable[[], object]) -> int:
        """In the zygote: fork the worker, which calls ``work`` and exits. Returns its pid on this side."""

    @abc.abstractmethod
    def confine(self, slot: Slot) -> None:
        """In the worker, once: enter what belongs to the slot, give up what no process in it needs."""

    @abc.abstractmethod
    def enter(self, slot: Slot) -> None:
        """In the forked snippet process: give up what the worker still has; enter an empty directory."""

    @abc.abstractmethod
    def processes(self) -> list[int]:
        """In the worker: every process of the running snippet."""

    @abc.abstractmethod
    def kill(self) -> None:
        """In the worker: leave no process of the snippet."""

    @abc.abstractmethod
    def end(self, slot: Slot) -> None:
        """In the worker: leave no process and no file of the snippet, and an empty directory for the next."""


def exit_after(work: Callable[[], object]) -> NoReturn:
    """In a forked process: call ``work`` and exit. It must never run on into its parent's code."""
    exit_code = 1
    try:
        work()
        exit_code = 0
    except Exception:  # noqa: BLE001  # whatever it is ends this process and is told here
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def become(uid: int) -> None:
    """Change to a user of its own, who has no capabilities."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def limit_processes(limits: Limits) -> None:
    """Let the kernel count the user's processes; it does not for root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))


def announce_scratch(work_dir: str, temporary_dir: str) -> None:
    """Name the directories that snippets may write to, in the environment that they inherit."""
    os.environ["HOME"] = work_dir
    os.environ["TMPDIR"] = temporary_dir
    tempfile.tempdir = None  # forget what a preloaded module may have looked up


class BasicIsolation(Isolation):
    """Resource limits, a session of its own, a scratch directory; another uid where that is possible.

    It does not hide the host's files, network or processes.
    """

    name = "basic"

    def __init__(self) -> None:
        super().__init__()
        self._change_uid = os.geteuid() == 0 and _readable_by_everyone(sys.prefix, sys.base_prefix)
        self.layers = ["rlimits", "kill of all descendants", "scrubbed environment", "no_new_privs"]
        if self._change_uid:
            self.layers.append("uid per slot")

    def probe(self) -> str | None:
        return None

    def prepare(self, scratch_root: Path) -> None:
        pass  # the slots make their own directories

    def fork_worker(self, slot: Slot, work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            exit_after(work)
        return pid

    def confine(self, slot: Slot) -> None:
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        self._make_scratch(slot)
        announce_scratch(str(slot.scratch_dir), str(slot.scratch_dir))

    def _make_scratch(self, slot: Slot) -> None:
        slot.scratch_dir.mkdir(mode=0o700)
        if self._change_uid:
            os.chown(slot.scratch_dir, slot.uid, slot.uid)

    def enter(self, slot: Slot) -> None:
        worker = os.getppid()
        os.setsid()
        if self._change_uid:
            limit_processes(slot.limits)
            become(slot.uid)
        # The zygote is not dumpable; without it /proc/self is closed to the snippet.
        linux.prctl(linux.PR_SET_DUMPABLE, 1)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(1)  # the worker died before the line above took effect
        os.chdir(slot.scratch_dir)

    def processes(self) -> list[int]:
        return proctree.descendants(os.getpid())

    def kill(self) -> None:
        proctree.kill_children()

    def end(self, slot: Slot) -> None:
        self.kill()
        remove_tree(slot.scratch_dir)
        self._make_scratch(slot)


def _readable_by_everyone(*paths: str) -> bool:
    return all(
        os.stat(part).st_mode & 0o005 == 0o005 for path in paths for part in [Path(path), *Path(path).parents]
    )
