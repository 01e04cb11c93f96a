"""The zygote and the workers as the server sees them: processes behind sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztrl_sandbox.capture import PipeReader
from ztrl_sandbox.cgroup import MemoryCgroups
from ztrl_sandbox.files import Collection, memory_file, pack
from ztrl_sandbox.protocol import MEMORY_EXIT_CODE, ExecutionRequest, ExecutionResult, Limits, Status

_logger = logging.getLogger("ztrl_sandbox")

_FRAME_BYTES = 4096
_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)
_BOOT = (
    "import sys; sys.path.insert(0, {root!r}); from ztrl_sandbox.zygote import main; del sys.path[0]; main()"
)
_HUNG_WORKER_SECONDS = 10.0
"""A worker that reports nothing for this long after its snippet's time-out is killed and replaced."""

_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "1",  # an arena for each thread would reserve 64 MiB of the address space that is limited
    "PYTHONHASHSEED": "0",  # the same snippet prints a set in the same order every time
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
}
"""All that the zygote, and hence a snippet, sees of the server's environment."""


def _receive(sock: socket.socket) -> dict[str, Any] | None:
    """One frame from a readable socket; None at its end."""
    try:
        data = sock.recv(_FRAME_BYTES)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None


def _sandbox_error(message: str) -> ExecutionResult:
    return ExecutionResult(status=Status.SANDBOX_ERROR, message=message)


class Call:
    """One snippet in a worker."""

    def __init__(self, worker: WorkerHandle, limits: Limits, fetch_files: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[ExecutionResult] = loop.create_future()
        self.stdout, self.stderr = (
            PipeReader(limits.output_bytes, limits.flood_bytes, lambda: worker.cancel(self)) for _ in range(2)
        )
        self.collection = Collection(fetch_files) if fetch_files else None
        self.session_alive = False
        """Once done: whether the process, and with it the session's variables, lives on."""

    def finish(self, report: dict[str, Any] | None, message: str = "") -> None:
        """Resolve with the worker's report; None means that the worker is dead."""
        self.stdout.finish()
        self.stderr.finish()
        files, remarks = self.collection.finish() if self.collection is not None else ({}, "")
        if self.done.done():
            return  # the caller is gone
        if report is None:
            self.done.set_result(_sandbox_error(message))
            return
        if report["reason"] == "not_begun":
            self.done.set_result(ExecutionResult(status=Status.REJECTED, message=report["message"]))
            return
        self.session_alive = report["alive"]
        status = self._status(report["reason"], report["exit_code"])
        exit_code = 1 if report["exit_code"] == MEMORY_EXIT_CODE else report["exit_code"]
        self.done.set_result(
            ExecutionResult(
                status=status,
                stdout=self.stdout.output.text(),
                stderr=self.stderr.output.text(),
                exit_code=exit_code,
                run_seconds=report["run_seconds"],
                cpu_seconds=report["cpu_seconds"],
                peak_memory_bytes=report["peak_memory_bytes"],
                message=remarks,
                files=files,
            )
        )

    def _status(self, reason: str | None, exit_code: int) -> Status:
        if reason == "cancelled":
            flooded = self.stdout.flooded or self.stderr.flooded
            return Status.OUTPUT_TRUNCATED if flooded else Status.SANDBOX_ERROR
        if reason is not None:
            # "closed": a session's code that closed its own channel, so that nobody could tell when it ends.
            return {"timeout": Status.TIMEOUT, "memory": Status.MEMORY}.get(reason, Status.KILLED)
        if exit_code == MEMORY_EXIT_CODE:
            return Status.MEMORY
        if exit_code == -signal.SIGXCPU:
            return Status.TIMEOUT
        if exit_code != 0:
            return Status.KILLED if exit_code < 0 else Status.ERROR
        cut = self.stdout.output.truncated or self.stderr.output.truncated
        return Status.OUTPUT_TRUNCATED if cut else Status.OK


class WorkerHandle:
    """A worker as the server sees it: two sockets, and the call that it runs.

    Args:
        slot: Its number, which no other live worker has.
        limits: Caps on what it runs.
        on_idle: Called whenever a call has ended and the worker can take another.
    """

    def __init__(self, slot: int, limits: Limits, on_idle: Callable[[WorkerHandle], None]) -> None:
        self.slot = slot
        self.pid = 0
        self.served = 0
        """Calls that it has run."""
        self.armed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()
        """It takes no more calls; its process ends, or has ended."""
        self.due = asyncio.Event()
        """It should be replaced: it is closed, or has served long enough."""
        self._limits = limits
        self._on_idle = on_idle
        self._call: Call | None = None
        self._calls = 0
        """That were started."""
        self._hung: asyncio.TimerHandle | None = None
        self._retiring = False
        self._pidfd = -1
        self._loop = asyncio.get_running_loop()
        self._requests, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.worker_ends = (requests, control)
        self._control.setblocking(False)
        self._requests.setblocking(False)
        self._loop.add_reader(self._control, self._on_frame)

    def start(self, request: ExecutionRequest, *, keep: bool = False) -> Call:
        """Hand over a request. The worker must be idle.

        Args:
            request: The code and its limits.
            keep: Run it in the session's process, which stays for more.
        """
        assert self._call is None
        call = self._call = Call(self, self._limits, request.fetch_files)
        memory_bytes = min(request.memory_limit_bytes or self._limits.memory_bytes, self._limits.memory_bytes)
        options = {
            "start": True,
            "number": self._calls,
            "run_timeout_seconds": request.run_timeout_seconds,
            "memory_bytes": memory_bytes,
            "print_last_expression": request.print_last_expression,
            "keep": keep,
            "fetch": call.collection is not None,
        }
        self._calls += 1
        frame = json.dumps(options).encode()
        # Lone surrogates cannot be encoded strictly; the snippet's own parser shall complain, not the server.
        code_fd = memory_file(request.code.encode("utf-8", "surrogatepass"))
        stdin_fd = (
            os.open("/dev/null", os.O_RDONLY)
            if request.stdin is None
            else memory_file(request.stdin.encode("utf-8", "surrogatepass"))
        )
        files_fd = [pack(request.files)] if request.files else []
        try:
            # The worker must know of the start before the snippet can have ended.
            self._control.send(frame)
            fds = [code_fd, stdin_fd, call.stdout.write_fd, call.stderr.write_fd, *files_fd]
            socket.send_fds(self._requests, [frame], fds)
            if call.collection is not None:
                collect = {"collect": True, "number": options["number"]}
                socket.send_fds(self._requests, [json.dumps(collect).encode()], call.collection.fds)
        except (BrokenPipeError, ConnectionResetError):
            self._on_end("the worker died")
        finally:
            for fd in (code_fd, stdin_fd, *files_fd):
                os.close(fd)
            call.stdout.close_write_end()
            call.stderr.close_write_end()
        if self._call is not None:
            self._hung = self._loop.call_later(request.run_timeout_seconds + _HUNG_WORKER_SECONDS, self.kill)
        return call

    def cancel(self, call: Call) -> None:
        """Stop the snippet of ``call`` if it still runs; the worker stays."""
        if call is not self._call:
            return  # its end has come first, and what runs now is somebody else's
        try:
            self._control.send(json.dumps({"cancel": True}).encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # a dead worker's snippet is dead, and the end of the socket is about to be read

    def kill(self) -> None:
        """Kill the worker, which hangs; the snippet dies with it."""
        _logger.error("worker %d (pid %d) hangs and is killed", self.slot, self.pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def retire(self) -> None:
        """End it as soon as it is idle."""
        self._retiring = True
        if self._call is None:
            self.close()

    def close(self, why: str = "the executor is stopping") -> None:
        """End the worker: it sees its sockets close, kills its snippet (whose caller is told why) and exits."""
        if not self.closed.is_set():
            self._on_end(why)

    async def ended(self) -> None:
        """Wait until the process of a closed worker is gone; kill it if it will not go."""
        if self._pidfd < 0:
            return  # it died before it was ready
        try:
            async with asyncio.timeout(_HUNG_WORKER_SECONDS):
                await _readable(self._pidfd)
        except TimeoutError:
            self.kill()
            await _readable(self._pidfd)
        os.close(self._pidfd)

    def _on_frame(self) -> None:
        frame = _receive(self._control)
        if frame is None:
            self._on_end("the worker died")
        elif "armed" in frame:
            self._on_armed(frame["armed"])
        else:
            self.served += 1
            self._end_call(frame)
            if self._retiring:
                self.close()
            else:
                self._on_idle(self)

    def _on_armed(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._on_end("the worker died")
        else:
            self.pid = pid
            self.armed.set_result(None)

    def _end_call(self, report: dict[str, Any] | None, message: str = "") -> None:
        if self._hung is not None:
            self._hung.cancel()
            self._hung = None
        call, self._call = self._call, None
        if call is not None:
            call.finish(report, message)

    def _on_end(self, message: str) -> None:
        self._loop.remove_reader(self._control)
        self._control.close()
        self._requests.close()
        self.closed.set()
        self.due.set()
        self._end_call(None, message)
        if not self.armed.done():
            self.armed.set_exception(RuntimeError(f"worker {self.slot} ended before it was ready"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """How snippets are isolated."""

    name: str = ""
    reason: str = ""
    """Why it is this one."""
    layers: tuple[str, ...] = ()
    """What separates a snippet from the host."""


class ZygoteHandle:
    """The running zygote."""

    def __init__(
        self,
        *,
        preload: Sequence[str],
        isolation: str,
        limits: Limits,
        scratch_root: Path,
        cgroups: MemoryCgroups | None,
    ) -> None:
        self._socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "preload": list(preload),
            "isolation": isolation,
            "limits": dataclasses.asdict(limits),
            "scratch_root": str(scratch_root),
            "cgroups": None if cgroups is None else [cgroups.parent_fd, cgroups.name],
        }
        boot = _BOOT.format(root=_PACKAGE_ROOT)
        # -P and -s: neither the working directory nor the user's site-packages may shadow a module.
        command = [sys.executable, "-P", "-s", "-c", boot, str(child_end.fileno()), json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[child_end.fileno(), *([] if cgroups is None else [cgroups.parent_fd])],
            start_new_session=True,  # a terminal's Ctrl-C is for the server alone
        )
        child_end.close()
        self.pid = self._process.pid
        self.dead = asyncio.Event()
        self._pidfd = os.pidfd_open(self.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._on_death)

    async def wait_ready(self) -> Tier:
        """Wait until it has imported everything; returns the isolation tier in force.

        Raises:
            ValueError: it cannot: a module of ``preload`` or the isolation tier is not available.
        """
        await _readable(self._socket.fileno())
        frame = _receive(self._socket) or {"error": "it died while it started"}
        if "error" in frame:
            raise ValueError(f"the zygote cannot start: {frame['error']}")
        return Tier(
            name=frame["isolation"],
            reason=frame["isolation_reason"],
            layers=tuple(frame.get("layers", ())),
        )

    def spawn(self, worker: WorkerHandle, cgroup_fd: int | None) -> None:
        """Fork a worker, which joins the cgroup if there is one. Raises ``OSError`` when the zygote is dead."""
        fds = [end.fileno() for end in worker.worker_ends]
        if cgroup_fd is not None:
            fds.append(cgroup_fd)
        socket.send_fds(self._socket, [json.dumps({"spawn": worker.slot}).encode()], fds)

    @property
    def alive(self) -> bool:
        """Whether it can still fork. One that dies closes its socket a moment before its death can be seen."""
        hang_up = select.poll()
        hang_up.register(self._socket, 0)
        return self._process.poll() is None and not hang_up.poll(0)

    async def close(self) -> None:
        """End it, and wait until it is gone."""
        self._socket.close()
        await self.dead.wait()
        self._process.wait()

    def _on_death(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.dead.set()


async def _readable(fd: int) -> None:
    """Wait until ``fd`` can be read; a pidfd can once its process has ended."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
