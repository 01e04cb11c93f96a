"""One slot: a process that arms, times, limits and kills one snippet at a time.

The worker forks the next snippet process *before* its request exists ("arms" it), so that forking and
isolating cost a caller nothing. A request reaches only that single-use process: worker and zygote never
hold code or output, so a later snippet, forked from the worker's memory, cannot find an earlier one's.

Two SOCK_SEQPACKET sockets join a worker to the server:

``requests``
    server → armed snippet process: one JSON datagram of options with four descriptors (code, stdin, stdout,
    stderr). The process closes it before it runs the code.
``control``
    server → worker: ``{"start": true, "run_timeout_seconds": s, ...}`` (sent before the request) and
    ``{"cancel": true}``; worker → server: ``{"armed": pid}`` once, then one report per snippet. The snippet's
    process has no access to it, so it cannot forge a report. End of file means that the server is gone: kill
    the snippet and exit.
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
from dataclasses import dataclass
from typing import Any

from ztrl_sandbox import harness, linux, proctree
from ztrl_sandbox.isolation import Isolation, Slot

_FRAME_BYTES = 4096
_WATCH_INTERVAL_SECONDS = 0.05
"""How often memory and process counts of a running snippet are read."""


@dataclass(slots=True)
class _Running:
    started_at: float
    deadline: float
    memory_bytes: int


class Worker:
    """The worker's loop."""

    def __init__(
        self, slot: Slot, isolation: Isolation, requests: socket.socket, control: socket.socket
    ) -> None:
        self._slot = slot
        self._isolation = isolation
        self._requests = requests
        self._control = control
        self._tree_bytes = 0

    def run(self) -> None:
        """Serve snippets until the server closes ``control``."""
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        gc.freeze()
        linux.collapse_writable_memory()
        pid, pidfd = self._arm()
        self._send(armed=os.getpid())
        while True:
            start = self._await_start(pidfd)
            if start is None:
                self._isolation.end(self._slot)
                return
            reason = self._watch(pid, pidfd, start)
            os.close(pidfd)
            report = self._finish(pid, reason, start)
            self._send(**report)
            if reason == "server_gone":
                return
            pid, pidfd = self._arm()

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
        return json.loads(data) if data else None

    def _arm(self) -> tuple[int, int]:
        pid = self._isolation.fork(self._slot)
        if pid == 0:
            exit_code = 1
            try:
                exit_code = self._be_snippet()
            finally:
                os._exit(exit_code)
        return pid, os.pidfd_open(pid)

    def _be_snippet(self) -> int:
        self._control.close()
        self._isolation.enter(self._slot)
        # Descriptor 3 is the request socket; everything else inherited goes before any code arrives.
        os.dup2(self._requests.fileno(), 3)
        os.closerange(4, 1 << 20)
        requests = socket.socket(fileno=3)
        self._requests.detach()
        message, fds, _, _ = socket.recv_fds(requests, _FRAME_BYTES, 4, socket.MSG_CMSG_CLOEXEC)
        requests.close()
        if not message:
            return 0
        options = json.loads(message)
        source = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
        harness.connect_streams(*fds[1:])
        harness.apply_rlimits(self._slot.limits, options["memory_bytes"], options["run_timeout_seconds"])
        return harness.run(source, print_last_expression=options["print_last_expression"])

    def _await_start(self, pidfd: int) -> _Running | None:
        """Wait for the next start frame. None: the server is gone, or the armed process died."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            # A quick snippet may be over already, so the start frame (always sent first) has precedence.
            if self._control.fileno() not in ready:
                return None
            frame = self._receive()
            if frame is None:
                return None
            if "start" in frame:  # a cancel that comes after the end of its snippet is void
                now = time.monotonic()
                return _Running(now, now + frame["run_timeout_seconds"], frame["memory_bytes"])

    def _watch(self, pid: int, pidfd: int, running: _Running) -> str | None:
        """Wait for the snippet's end. Returns why it must be killed; None when it ended by itself."""
        self._tree_bytes = 0
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        while True:
            remaining = running.deadline - time.monotonic()
            if remaining <= 0:
                return "timeout"
            ready = [fd for fd, _ in poller.poll(1000 * min(remaining, _WATCH_INTERVAL_SECONDS))]
            if pidfd in ready:
                return None
            if ready:
                frame = self._receive()
                return "server_gone" if frame is None else "cancelled"
            excess = self._excess(running)
            if excess is not None:
                return excess

    def _excess(self, running: _Running) -> str | None:
        """Which tree-wide limit the snippet exceeds."""
        pids = proctree.descendants(os.getpid())
        if proctree.count_tasks(pids) > self._slot.limits.processes:
            return "processes"
        if sum(map(proctree.resident_bytes, pids)) <= running.memory_bytes:
            return None
        # That sum counts pages shared with the preloaded interpreter once per process; this one does not.
        self._tree_bytes = max(self._tree_bytes, sum(map(proctree.proportional_bytes, pids)))
        allowed_bytes = running.memory_bytes + proctree.resident_bytes(os.getpid())
        return "memory" if self._tree_bytes > allowed_bytes else None

    def _finish(self, pid: int, reason: str | None, running: _Running) -> dict[str, Any]:
        if reason is not None:
            os.kill(pid, signal.SIGKILL)
        _, wait_status, usage = os.wait4(pid, 0)
        run_seconds = time.monotonic() - running.started_at
        self._isolation.end(self._slot)
        return {
            "reason": reason,
            "exit_code": os.waitstatus_to_exitcode(wait_status),
            "run_seconds": run_seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory_bytes": max(self._tree_bytes, usage.ru_maxrss * 1024),
        }
