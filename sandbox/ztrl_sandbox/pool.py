"""The server's side of the process tree: keeps the zygote and the workers alive, queues and runs requests."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ztrl_sandbox.capture import PipeReader
from ztrl_sandbox.protocol import MEMORY_EXIT_CODE, ExecutionRequest, ExecutionResult, Limits, Status

_logger = logging.getLogger("ztrl_sandbox")

_FRAME_BYTES = 4096
_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)
_BOOT = (
    "import sys; sys.path.insert(0, {root!r}); from ztrl_sandbox.zygote import main; del sys.path[0]; main()"
)
_HUNG_WORKER_SECONDS = 10.0
"""A worker that reports nothing for this long after its snippet's time-out is killed and replaced."""
_RESPAWN_PAUSE_SECONDS = 0.5
"""Between attempts when a worker or zygote cannot even start."""

_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the same snippet prints a set in the same order every time
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")},
}
"""All that the zygote, and hence a snippet, sees of the server's environment."""


class QueueFullError(Exception):
    """The queue is full; try again after ``retry_after_seconds``."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"queue full, retry after {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """What a pool needs to start."""

    workers: int = 2
    """Snippets that run at once."""
    preload: Sequence[str] = ("math", "sympy")
    """Modules that snippets find imported already."""
    isolation: str = "auto"
    """``auto``, ``namespaces`` or ``basic``."""
    queue_limit: int = 4096
    """Requests that may wait for a worker; more are rejected."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.queue_limit < 0:
            raise ValueError(f"queue_limit must not be negative, got {self.queue_limit}")


def _receive(sock: socket.socket) -> dict[str, Any] | None:
    """One frame from a readable socket; None at its end."""
    try:
        data = sock.recv(_FRAME_BYTES)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None


def _sandbox_error(message: str) -> ExecutionResult:
    return ExecutionResult(status=Status.SANDBOX_ERROR, message=message)


class _Call:
    """One snippet in a worker."""

    def __init__(self, worker: _WorkerHandle, limits: Limits) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[ExecutionResult] = loop.create_future()
        self.stdout, self.stderr = (
            PipeReader(limits.output_bytes, limits.flood_bytes, worker.cancel) for _ in range(2)
        )

    def finish(self, report: dict[str, Any] | None, message: str = "") -> None:
        """Resolve with the worker's report; None means that the worker is dead."""
        self.stdout.finish()
        self.stderr.finish()
        if self.done.done():
            return  # the caller is gone
        if report is None:
            self.done.set_result(_sandbox_error(message))
            return
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
            )
        )

    def _status(self, reason: str | None, exit_code: int) -> Status:
        if reason == "cancelled":
            flooded = self.stdout.flooded or self.stderr.flooded
            return Status.OUTPUT_TRUNCATED if flooded else Status.SANDBOX_ERROR
        if reason is not None:
            return {"timeout": Status.TIMEOUT, "memory": Status.MEMORY, "processes": Status.KILLED}[reason]
        if exit_code == MEMORY_EXIT_CODE:
            return Status.MEMORY
        if exit_code == -signal.SIGXCPU:
            return Status.TIMEOUT
        if exit_code != 0:
            return Status.KILLED if exit_code < 0 else Status.ERROR
        cut = self.stdout.output.truncated or self.stderr.output.truncated
        return Status.OUTPUT_TRUNCATED if cut else Status.OK


class _WorkerHandle:
    """A worker as the server sees it: two sockets, and the call that it runs."""

    def __init__(self, slot: int, limits: Limits, on_idle: Any) -> None:
        self.slot = slot
        self.pid = 0
        self.armed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()
        self._limits = limits
        self._on_idle = on_idle
        self._call: _Call | None = None
        self._hung: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._requests, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.worker_ends = (requests, control)
        self._control.setblocking(False)
        self._requests.setblocking(False)
        self._loop.add_reader(self._control, self._on_frame)

    def start(self, request: ExecutionRequest) -> _Call:
        """Hand over a request. The worker must be idle."""
        assert self._call is None
        call = self._call = _Call(self, self._limits)
        memory_bytes = min(request.memory_limit_bytes or self._limits.memory_bytes, self._limits.memory_bytes)
        options = {
            "run_timeout_seconds": request.run_timeout_seconds,
            "memory_bytes": memory_bytes,
            "print_last_expression": request.print_last_expression,
        }
        # Lone surrogates cannot be encoded strictly; the snippet's own parser shall complain, not the server.
        code_fd = _memory_file(request.code.encode("utf-8", "surrogatepass"))
        stdin_fd = (
            os.open("/dev/null", os.O_RDONLY)
            if request.stdin is None
            else _memory_file(request.stdin.encode("utf-8", "surrogatepass"))
        )
        try:
            # The worker must know of the start before the snippet can have ended.
            self._control.send(json.dumps({"start": True, **options}).encode())
            fds = [code_fd, stdin_fd, call.stdout.write_fd, call.stderr.write_fd]
            socket.send_fds(self._requests, [json.dumps(options).encode()], fds)
        except (BrokenPipeError, ConnectionResetError):
            self._on_end("the worker died")
        finally:
            os.close(code_fd)
            os.close(stdin_fd)
            call.stdout.close_write_end()
            call.stderr.close_write_end()
        if self._call is not None:
            self._hung = self._loop.call_later(request.run_timeout_seconds + _HUNG_WORKER_SECONDS, self.kill)
        return call

    def cancel(self) -> None:
        """Kill the running snippet; the worker stays."""
        try:
            self._control.send(json.dumps({"cancel": True}).encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # a dead worker's snippet is dead, and the end of the socket is about to be read

    def kill(self) -> None:
        """Kill the worker, which hangs; the snippet dies with it."""
        _logger.error("worker %d (pid %d) hangs and is killed", self.slot, self.pid)
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the worker: it sees its sockets close, kills its snippet and exits."""
        if not self.closed.is_set():
            self._on_end("the executor is stopping")

    def _on_frame(self) -> None:
        frame = _receive(self._control)
        if frame is None:
            self._on_end("the worker died")
        elif "armed" in frame:
            self.pid = frame["armed"]
            self.armed.set_result(None)
        else:
            self._end_call(frame)
            self._on_idle(self)

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
        self._end_call(None, message)
        if not self.armed.done():
            self.armed.set_exception(RuntimeError(f"worker {self.slot} ended before it was ready"))


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("request", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class ZygoteHandle:
    """The running zygote."""

    def __init__(self, config: PoolConfig, scratch_root: Path) -> None:
        self._socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "preload": list(config.preload),
            "isolation": config.isolation,
            "limits": dataclasses.asdict(config.limits),
            "scratch_root": str(scratch_root),
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
            pass_fds=[child_end.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C is for the server alone
        )
        child_end.close()
        self.pid = self._process.pid
        self.isolation = ""
        self.isolation_reason = ""

    async def wait_ready(self) -> None:
        """Wait until it has imported everything.

        Raises:
            ValueError: it cannot: a module of ``preload`` or the isolation tier is not available.
        """
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, readable.set)
        await readable.wait()
        loop.remove_reader(self._socket)
        frame = _receive(self._socket) or {"error": "it died while it started"}
        if "error" in frame:
            raise ValueError(f"the zygote cannot start: {frame['error']}")
        self.isolation = frame["isolation"]
        self.isolation_reason = frame["isolation_reason"]

    def spawn(self, worker: _WorkerHandle) -> None:
        """Fork a worker. Raises ``OSError`` when the zygote is dead."""
        fds = [end.fileno() for end in worker.worker_ends]
        socket.send_fds(self._socket, [json.dumps({"spawn": worker.slot}).encode()], fds)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def close(self) -> None:
        """End it, and wait until it is gone."""
        self._socket.close()
        await asyncio.to_thread(self._process.wait)


class WorkerPool:
    """A fixed number of workers behind one bounded first-in first-out queue."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.queued = 0
        self.restarts = 0
        self._idle: asyncio.Queue[_WorkerHandle] = asyncio.Queue()
        self._workers: dict[int, _WorkerHandle] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._zygote: ZygoteHandle | None = None
        self._zygote_lock = asyncio.Lock()
        self._scratch_root = Path(tempfile.mkdtemp(prefix="ztrl-sandbox-"))
        self._mean_run_seconds = 0.1

    async def start(self) -> None:
        """Start everything; returns when every worker is ready.

        Raises:
            ValueError: the configuration cannot be satisfied on this machine.
        """
        try:
            await self._live_zygote()
        except ValueError:
            await self.stop()
            raise
        await asyncio.gather(*(self._spawn(slot) for slot in range(self.config.workers)))
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self.config.workers)]

    async def stop(self) -> None:
        """Kill what runs (its callers get ``sandbox_error``), end every process, remove every file."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        workers, self._workers = list(self._workers.values()), {}
        exits = [os.pidfd_open(worker.pid) for worker in workers if worker.pid and not worker.closed.is_set()]
        for worker in workers:
            worker.close()
        await asyncio.gather(*map(_process_end, exits))
        if self._zygote is not None:
            await self._zygote.close()
        shutil.rmtree(self._scratch_root, ignore_errors=True)

    @property
    def zygote(self) -> ZygoteHandle:
        assert self._zygote is not None
        return self._zygote

    @property
    def worker_pids(self) -> list[int]:
        """Live workers."""
        return [worker.pid for worker in self._workers.values() if not worker.closed.is_set()]

    @property
    def idle(self) -> int:
        """Workers that wait for a request."""
        return self._idle.qsize()

    async def execute(self, request: ExecutionRequest) -> ExecutionResult:
        """Run one snippet. Cancelling the caller kills the snippet.

        Raises:
            QueueFullError: too many requests wait already.
        """
        if self._idle.empty() and self.queued >= self.config.queue_limit:
            wait_seconds = self.queued * self._mean_run_seconds / self.config.workers
            raise QueueFullError(max(1, min(60, round(wait_seconds))))
        arrived_at = time.monotonic()
        self.queued += 1
        try:
            worker = await self._idle.get()
            while worker.closed.is_set():
                worker = await self._idle.get()
        finally:
            self.queued -= 1
        queue_seconds = time.monotonic() - arrived_at
        call = worker.start(request)
        try:
            result = await call.done
        except asyncio.CancelledError:
            worker.cancel()
            raise
        self._mean_run_seconds += 0.05 * (result.run_seconds - self._mean_run_seconds)
        return dataclasses.replace(result, queue_seconds=queue_seconds)

    async def _keep(self, slot: int) -> None:
        """Replace this slot's worker whenever it dies."""
        while True:
            await self._workers[slot].closed.wait()
            self.restarts += 1
            _logger.warning("worker %d died and is replaced", slot)
            while True:
                try:
                    await self._spawn(slot)
                    break
                except (OSError, RuntimeError, ValueError) as error:
                    _logger.error("worker %d cannot be started: %s", slot, error)
                    await asyncio.sleep(_RESPAWN_PAUSE_SECONDS)

    async def _spawn(self, slot: int) -> None:
        zygote = await self._live_zygote()
        shutil.rmtree(self._scratch_root / f"slot-{slot}", ignore_errors=True)
        worker = _WorkerHandle(slot, self.config.limits, self._idle.put_nowait)
        try:
            zygote.spawn(worker)
        finally:
            for end in worker.worker_ends:
                end.close()
        await worker.armed
        self._workers[slot] = worker
        self._idle.put_nowait(worker)

    async def _live_zygote(self) -> ZygoteHandle:
        """The zygote; a new one if it has died."""
        async with self._zygote_lock:
            if self._zygote is None or not self._zygote.alive:
                self._zygote = ZygoteHandle(self.config, self._scratch_root)
                await self._zygote.wait_ready()
            return self._zygote


async def _process_end(pidfd: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)
