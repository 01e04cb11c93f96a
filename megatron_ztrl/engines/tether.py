"""``python tether.py PARENT_PID COMMAND...``: COMMAND ends with the thread that started it, and takes all along.

The processes of an SGLang server tie themselves to its launcher, but only after some ten seconds of imports: those of
a launcher that is killed before that would stay for ever. So a guard stays in the launcher's session, asleep until
the launcher has ended, kills whoever is left, and removes what they shared through memory.

A small program and not a ``preexec_fn``, which may deadlock in a process with threads (a Ray actor has many). It needs
nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 15.0
"""How long a process may take to be gone."""
POLL_SECONDS = 0.01
SHARED_FILES_VARIABLE = "ZTRL_SHARED_FILES"
"""Where the command's environment names a file, that lists files which killed processes would leave, one a line."""


def main() -> None:
    """Ask the kernel for a signal, leave a guard behind, then become the command."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(sys.argv[1]):  # the parent died before the kernel knew of the tie
        sys.exit(1)
    launcher = os.getpid()
    if os.fork() == 0:
        _guard(launcher)
        os._exit(0)
    os.execvp(sys.argv[2], sys.argv[2:])


def _guard(launcher: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(launcher)], [], [])
    end_session(launcher, spare=os.getpid())
    with contextlib.suppress(KeyError, FileNotFoundError):  # there is no list, or not yet
        for path in Path(os.environ[SHARED_FILES_VARIABLE]).read_text().splitlines():
            Path(path).unlink(missing_ok=True)


def end_session(session: int, *, spare: int | None = None) -> None:
    """Kill the processes of a session, and wait until they are gone.

    Python's resource tracker goes last and by itself: it removes the semaphores of those it served.

    Args:
        session: the process id of its leader, which may have ended.
        spare: a process of the session that stays.

    Raises:
        RuntimeError: one does not end.
    """
    began = time.monotonic()
    while members := [pid for pid in session_members(session) if pid != spare]:
        waited_seconds = time.monotonic() - began
        if waited_seconds > 2 * GRACE_SECONDS:
            raise RuntimeError(f"processes {members} were killed and do not end")
        for pid in members:
            if waited_seconds > GRACE_SECONDS or not _is_resource_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def session_members(session: int) -> Iterator[int]:
    """The processes of a session that run; a zombie holds nothing, and may stay one for ever."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends at this moment
                # "pid (name) state parent group session ...", and the name may contain anything.
                state, _, _, its_session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(its_session) == session and state not in "ZX":
                    yield int(entry.name)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    main()
