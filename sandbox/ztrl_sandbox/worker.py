"""One slot: a process that arms, times, limits and kills one snippet at a time.

The worker forks the next snippet process *before* its request exists ("arms" it), so that forking and
isolating cost a caller nothing. A request reaches only that process: worker and zygote never hold code or
output, so a later snippet, forked from the worker's memory, cannot find an earlier one's.

Two SOCK_SEQPACKET sockets join a worker to the server:

``requests``
    server → armed snippet process: one JSON datagram of options with four descriptors (code, stdin, stdout,
    stderr) and, if there are any, a fifth: the files for its working directory. The process closes it before it
    runs the code, unless the request says ``keep``: then it stays for more code of the same session.
    If the request says ``fetch``, ``{"number": n, "collect": true}`` with two descriptors follows, for the process
    that reads files from the working directory when the snippet has ended.
``control``
    server → worker: the same options (sent before the request) and ``{"cancel": true}``; worker → server:
    ``{"armed": pid}`` once, then one report per request. The snippet's process has no access to it, so it cannot
    forge a report. End of file means that the server is gone: kill the snippet and exit.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Any

from ztrl_sandbox import files, harness, linux, proctree
from ztrl_sandbox.cgroup import SlotMemory
from ztrl_sandbox.isolation import Isolation, Slot, exit_after

_FRAME_BYTES = 4096
_WATCH_INTERVAL_SECONDS = 0.05
"""How often memory and process counts of a running snippet are read."""
_INTERRUPT_GRACE_SECONDS = 2.0
"""How long a session's code may take to stop at a ``KeyboardInterrupt`` before the session is killed: long enough for
a machine that is busy, since a session that could have lived is lost with all its variables."""
_EXIT_GRACE_SECONDS = 0.5
"""How long a session's process may take to die after the kernel has closed its descriptors."""


@dataclass(slots=True)
class _Armed:
    """A snippet process, and what tells of it."""

    pid: int
    pidfd: int
    ended_fd: int
    """Read end of a pipe: one byte, the exit code, for each piece of a session's code that ended; or why the code
    was not begun."""


@dataclass(slots=True)
class _Running:
    started_at: float
    deadline: float
    memory_bytes: int
    keep: bool
    fetch: bool
    """Whether files are to be collected when it has ended."""
    oom_kills: int = 0
    cpu_seconds_before: float = 0.0


class Worker:
    """The worker's loop.

    Args:
        slot: Which one this is.
        isolation: The tier in force.
        requests: See above.
        control: See above.
        memory: The slot's cgroup; None where there are none, and memory is watched instead.
    """

    def __init__(
        self,
        slot: Slot,
        isolation: Isolation,
        requests: socket.socket,
        control: socket.socket,
        memory: SlotMemory | None,
    ) -> None:
        self._slot = slot
        self._isolation = isolation
        self._requests = requests
        self._control = control
        self._memory = memory
        self._call_number = 0
        """Number of the call that runs, or that the armed process waits for."""
        self._tree_bytes = 0
        self._streams = harness.Streams.ahead_of_time()
        self._mapped_bytes = harness.mapped_bytes()

    def run(self) -> None:
        """Serve until the server closes ``control``."""
        pid_outside = int(os.readlink("/proc/self"))  # before this becomes another process table
        self._isolation.confine(self._slot)
        harness.apply_common_rlimits(self._slot.limits)
        gc.freeze()
        linux.collapse_writable_memory()
        armed = self._arm()
        self._send(armed=pid_outside)
        while True:
            start = self._await_start(armed)
            if start is None:
                self._isolation.end(self._slot)
                return
            reason = self._watch(armed, start)
            report = self._report(armed, reason, start)
            self._send(**report)
            if reason == "server_gone":
                return
            if not report["alive"]:
                os.close(armed.pidfd)
                os.close(armed.ended_fd)
                self._call_number += 1
                armed = self._arm()

    def _send(self, **frame: Any) -> None:
        # If the server is gone, the next read of `control` says so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(json.dumps(frame).encode())

    def _receive(self) -> dict[str, Any] | None:
        """The next control frame; None when the server is gone."""
        try:
            data = self._control.recv(_FRAME_BYTES)
        except ConnectionResetError:
            return None
        return json.loads(data.decode()) if data else None

    def _arm(self) -> _Armed:
        ended_fd, ended = os.pipe()
        pid = os.fork()
        if pid == 0:
            exit_code = 1
            try:
                os.close(ended_fd)
                exit_code = self._be_snippet(ended)
            except Exception:  # noqa: BLE001  # ours, not the snippet's: that has its own guard
                traceback.print_exc()
            finally:
                os._exit(exit_code)
        os.close(ended)
        return _Armed(pid, os.pidfd_open(pid), ended_fd)

    def _be_snippet(self, ended: int) -> int:
        self._control.close()
        self._isolation.enter(self._slot)
        interrupts = harness.Interrupts()  # the worker ignores it; a session's first may come before its code
        signal.signal(signal.SIGINT, interrupts.on_signal)
        # Everything else inherited goes before any code arrives.
        kept = sorted((self._requests.fileno(), ended))
        for low, high in zip((2, *kept), (*kept, 1 << 20), strict=True):
            os.closerange(low + 1, high)
        taken = self._take("start")
        if taken is None:
            return 0
        options, fds = taken
        keep = options.get("keep", False)
        if len(fds) > 4:
            try:
                files.unpack(fds.pop())
            except OSError as error:  # the code has not begun: nobody else can have written to the pipe
                os.write(ended, f"the files cannot be put into the working directory: {error}"[:300].encode())
                return 1
        timeout_seconds = None if keep else options["run_timeout_seconds"]
        harness.apply_rlimits(self._mapped_bytes + options["memory_bytes"], timeout_seconds)
        if keep:
            return harness.run_session(self._requests, ended, interrupts, options, fds)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        source = harness.read_all(fds[0])
        self._streams.connect(*fds[1:])
        os.closerange(3, 1 << 20)
        return harness.run(source, print_last_expression=options["print_last_expression"])

    def _take(self, kind: str) -> tuple[dict[str, Any], list[int]] | None:
        """In a forked process: the next datagram that is for it. None: the server is gone.

        One that was killed early can have left its own unread.
        """
        while True:
            message, fds, _, _ = socket.recv_fds(self._requests, _FRAME_BYTES, 5, socket.MSG_CMSG_CLOEXEC)
            if not message:
                return None
            options = json.loads(message.decode())
            if options["number"] == self._call_number and kind in options:
                return options, fds
            for fd in fds:
                os.close(fd)

    def _await_start(self, armed: _Armed) -> _Running | None:
        """Wait for the next start frame. None: the server is gone, or the waiting process died."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(armed.pidfd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            # A quick snippet may be over already, so the start frame (always sent first) has precedence.
            if self._control.fileno() not in ready:
                return None
            frame = self._receive()
            if frame is None:
                return None
            if "start" in frame:  # a cancel that comes after the end of its snippet is void
                return self._begin(armed, frame)

    def _begin(self, armed: _Armed, frame: dict[str, Any]) -> _Running:
        now = time.monotonic()
        self._call_number = frame["number"]
        running = _Running(
            now,
            now + frame["run_timeout_seconds"],
            frame["memory_bytes"],
            keep=frame.get("keep", False),
            fetch=frame.get("fetch", False),
        )
        self._tree_bytes = 0
        if self._memory is not None:
            self._memory.limit(running.memory_bytes)
            running.oom_kills = self._memory.oom_kills()
        if running.keep:
            running.cpu_seconds_before = proctree.cpu_seconds(armed.pid)
        return running

    def _watch(self, armed: _Armed, running: _Running) -> str | None:
        """Wait for the end. Returns why the snippet must be stopped; None when it ended by itself."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(armed.pidfd, select.POLLIN)
        if running.keep:  # else the process closes it when its code arrives
            poller.register(armed.ended_fd, select.POLLIN)
        while True:
            remaining = running.deadline - time.monotonic()
            if remaining <= 0:
                return "timeout"
            events = poller.poll(1000 * min(remaining, _WATCH_INTERVAL_SECONDS))
            ready = {fd for fd, _ in events}
            if armed.pidfd in ready or armed.ended_fd in ready:
                return None
            if self._control.fileno() in ready:
                frame = self._receive()
                return "server_gone" if frame is None else "cancelled"
            _reap_orphans(armed.pid)
            excess = self._excess(running)
            if excess is not None:
                return excess

    def _excess(self, running: _Running) -> str | None:
        """Which limit of the whole slot the snippet exceeds."""
        pids = self._isolation.processes()
        if proctree.count_tasks(pids) > self._slot.limits.processes:
            return "processes"
        if self._memory is not None:
            return "memory" if self._memory.oom_kills() > running.oom_kills else None
        if sum(map(proctree.resident_bytes, pids)) <= running.memory_bytes:
            return None
        # That sum counts pages shared with the preloaded interpreter once per process; this one does not.
        self._tree_bytes = max(self._tree_bytes, sum(map(proctree.proportional_bytes, pids)))
        allowed_bytes = running.memory_bytes + proctree.resident_bytes(os.getpid())
        return "memory" if self._tree_bytes > allowed_bytes else None

    def _report(self, armed: _Armed, reason: str | None, running: _Running) -> dict[str, Any]:
        if running.keep and self._stopped_politely(armed, reason):
            return self._report_alive(armed, reason, running)
        return self._finish(armed, reason, running)

    def _stopped_politely(self, armed: _Armed, reason: str | None) -> bool:
        """Whether a session's code has ended, perhaps at our request, and its process waits for more."""
        patience_seconds = 0.0
        if reason in ("timeout", "cancelled"):
            os.kill(armed.pid, signal.SIGINT)
            patience_seconds = _INTERRUPT_GRACE_SECONDS
        elif reason is not None:
            return False
        poller = select.poll()
        poller.register(armed.pidfd, select.POLLIN)
        poller.register(armed.ended_fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(1000 * patience_seconds)}
        return armed.ended_fd in ready and armed.pidfd not in ready

    def _report_alive(self, armed: _Armed, reason: str | None, running: _Running) -> dict[str, Any]:
        code = os.read(armed.ended_fd, 1)
        if (
            not code
        ):  # it is about to die, or its code closed the pipe and nobody will tell when the next ends
            poller = select.poll()
            poller.register(armed.pidfd, select.POLLIN)
            died = poller.poll(1000 * _EXIT_GRACE_SECONDS)
            return self._finish(armed, reason or (None if died else "closed"), running)
        return {
            "reason": reason,
            "alive": True,
            "exit_code": code[0],
            "run_seconds": time.monotonic() - running.started_at,
            "cpu_seconds": proctree.cpu_seconds(armed.pid) - running.cpu_seconds_before,
            "peak_memory_bytes": max(self._tree_bytes, proctree.peak_resident_bytes(armed.pid)),
        }

    def _finish(self, armed: _Armed, reason: str | None, running: _Running) -> dict[str, Any]:
        if reason is not None:
            os.kill(armed.pid, signal.SIGKILL)
        _, wait_status, usage = os.wait4(armed.pid, 0)
        run_seconds = time.monotonic() - running.started_at
        exit_code = os.waitstatus_to_exitcode(wait_status)
        if self._memory is not None and exit_code != 0 and self._memory.oom_kills() > running.oom_kills:
            reason = reason or "memory"
        message = ""
        if exit_code != 0 and not running.keep:
            message = os.read(armed.ended_fd, _FRAME_BYTES).decode()
            reason = "not_begun" if message else reason
        if running.fetch:
            self._collect()
        self._isolation.end(self._slot)
        return {
            "reason": reason,
            "message": message,
            "alive": False,
            "exit_code": exit_code,
            "run_seconds": run_seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime - running.cpu_seconds_before,
            "peak_memory_bytes": max(self._tree_bytes, usage.ru_maxrss * 1024),
        }

    def _collect(self) -> None:
        """Have the files that are asked for read by a process that is as confined as the snippet was.

        Not by this one: it may read more than the snippet, and later snippets are forked from its memory.
        """
        self._isolation.kill()  # so that nobody changes them
        pid = os.fork()
        if pid == 0:
            exit_after(self._be_collector)
        os.waitpid(pid, 0)

    def _be_collector(self) -> None:
        self._control.close()
        with contextlib.suppress(
            OSError
        ):  # a working directory that is gone, or closed; the server sees no end
            self._isolation.enter(self._slot)
            taken = self._take("collect")
            if taken is not None:
                wanted, collected = taken[1]
                files.collect(wanted, self._slot.limits.fetch_bytes, collected)


def _reap_orphans(snippet: int) -> None:
    """Bury what the snippet's processes left behind, but not the snippet itself: its usage is still wanted."""
    while True:
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_pid != snippet:
                os.waitpid(ended.si_pid, 0)
                continue
        return
